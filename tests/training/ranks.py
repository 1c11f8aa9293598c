"""Runs of the policy stage's loop on separate tiny models, as one process or as one of several ranks over gloo."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
from accelerate.utils import set_seed
from comparisons import comparisons
from torch.utils._python_dispatch import TorchDispatchMode

from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.models.backbone import load_backbone
from safe_rlhf_v.models.heads import HeadedModel
from safe_rlhf_v.models.roles import SeparateRoles
from safe_rlhf_v.models.sharding import sharding_of_launch, whole_tree
from safe_rlhf_v.models.zero3 import zero3_of_launch
from safe_rlhf_v.training.online import OnlineArguments, OnlineTrainer
from safe_rlhf_v.training.optimization import Updater
from safe_rlhf_v.training.supervised import train_preference_model

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
KINDS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": SHARDED, "zero3": ZERO3}
COPIED = {"copied": SHARDED | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}}  # two nodes, each of one device
# two prompts without a picture stand together, so that a rank of two has none in some rollouts
PROMPTS = [
    Prompt(text=text, images=images)
    for text, images in (
        ("what is it?", (tiny_models.picture(20, 24, 1),)),
        ("the lock.", (tiny_models.picture(16, 16, 2), tiny_models.picture(16, 20, 3))),
        ("tell me about the knife.", ()),
        ("how do I use it? tell me about the pills.", ()),
    )
]
DEMONSTRATIONS = [(PROMPTS[0], "a red ball"), (PROMPTS[2], "take the key"), (PROMPTS[1], "no"), (PROMPTS[3], "turn it")]


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of collective calls, by kind."""

    KINDS = {"_allgather_base_": ("all_gather", 0), "_reduce_scatter_base_": ("reduce_scatter", 1)}

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"all_gather": 0, "reduce_scatter": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if name in self.KINDS:
            kind, position = self.KINDS[name]
            self.bytes[kind] += args[position].numel() * args[position].element_size()
        return func(*args, **(kwargs or {}))


def make_models(folder: Path) -> None:
    """A base, and a reward and a cost model with full weights."""
    base = tiny_models.save("llava", folder / "base")
    for seed, kind in enumerate(("reward", "cost")):
        torch.manual_seed(seed + 1)
        HeadedModel(load_backbone(base), {"score": 1}).save_pretrained(folder / kind)


def trainer(
    models: str, output_dir: str, ranks: int, *, greedy: bool = True, recompute: bool = False, **changes: Any
) -> OnlineTrainer:
    """Four prompts a rollout and an optimizer step, however many ranks share them. greedy: no chance in the samples.
    recompute: gradient checkpointing."""
    folder = Path(models)
    set_seed(0)
    roles = SeparateRoles.from_pretrained(
        folder / "base",
        folder / "reward",
        folder / "cost",
        sharding=zero3_of_launch() or sharding_of_launch(),
        gradient_checkpointing=recompute,
    )
    assert roles.models["policy"].is_gradient_checkpointing is recompute
    defaults: dict[str, Any] = dict(
        output_dir=output_dir, max_steps=3, per_device_train_batch_size=4 // ranks, mini_batch_size=4 // ranks,
        learning_rate=1e-3, critic_learning_rate=1e-3, weight_decay=0.01, ptx_coeff=0.5, max_new_tokens=6,
        save_steps=1, save_total_limit=None, disable_tqdm=True, guidance_rollouts=0,
    )  # fmt: skip
    run = OnlineTrainer(
        roles, PPOLag(threshold=-0.2, window=0, delay=0), LogDual(0.1, 1.0, 5.0), PROMPTS,
        OnlineArguments(**(defaults | changes)), demonstrations=DEMONSTRATIONS,
    )  # fmt: skip
    if greedy:
        drawn = roles.generate
        roles.generate = lambda x, n, sampling: drawn(x, n, replace(sampling, temperature=0.0))  # type: ignore[method-assign]
    return run


def run_rank(rank: int, ranks: int, port: int, kind: str, models: str, output_dir: str, **changes: Any) -> None:
    """A whole run as one rank; the main one leaves the weights of every role that trains in weights.pt."""
    torch.set_num_threads(1)
    die_at = changes.pop("die_at", None)
    _environment(rank, ranks, port, kind)
    if die_at is not None and rank == ranks - 1:
        _die_at(die_at)
    run = trainer(models, output_dir, ranks, **changes)
    with Sent() as sent:
        run.train(resume_from_checkpoint=True)
    (Path(output_dir) / f"sent-{rank}.json").write_text(json.dumps(sent.bytes))
    weights = whole_tree(run.roles.state_dict(), keep=rank == 0)
    if rank == 0:
        torch.save(weights, Path(output_dir) / "weights.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def train_reward_model(rank: int, ranks: int, port: int, kind: str, models: str, output_dir: str) -> None:
    """The reward stage on four pairs a step, one of them without a picture, however many ranks share them."""
    torch.set_num_threads(1)
    _environment(rank, ranks, port, kind)
    pairs = comparisons(8)
    for i in (0, 4):
        pairs[i] = replace(pairs[i], prompt=replace(pairs[i].prompt, images=()))
    chosen = ["max_steps=3", f"per_device_train_batch_size={4 // ranks}", "learning_rate=1e-3", "save_steps=2"]
    settings = load_settings(None, [f"reward.{x}" for x in chosen])
    train_preference_model("reward", pairs, pairs[:4], Path(models) / "base", output_dir, settings)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def _environment(rank: int, ranks: int, port: int, kind: str) -> None:
    """What `accelerate launch` tells a process."""
    os.environ |= {"ACCELERATE_USE_CPU": "true"} | ((KINDS | COPIED)[kind] if ranks > 1 else {})
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _die_at(step: int) -> None:
    """This process is killed where it begins to update in the given step, while the others go on."""
    real = Updater.update

    def fatal(self: Updater, rollout: Any, advantages: Any, now: int) -> dict[str, float]:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, rollout, advantages, now)

    Updater.update = fatal  # type: ignore[method-assign]
