"""Runs of the policy stage's loop on separate tiny models, as one process or as one of several ranks over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
from accelerate.utils import set_seed
from comparisons import comparisons
from forks import CONTEXT, serve
from rounding import smooth_adamw
from sections import of
from torch.utils._python_dispatch import TorchDispatchMode

from beavertails_v.schema import LabelledResponse, Prompt, Response
from guard.train import GuardOptions, train_guard
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.config import Settings, load_settings
from safe_rlhf_v.direct.train import train_direct
from safe_rlhf_v.distributed.fsdp2 import sharding_of_launch, whole_tree
from safe_rlhf_v.distributed.zero3 import zero3_of_launch
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.online.loop import OnlineArguments, OnlineTrainer
from safe_rlhf_v.online.updates import Updater
from safe_rlhf_v.roles.protocol import SeparateRoles
from safe_rlhf_v.training.supervised import train_preference_model, train_sft
from safe_rlhf_v.training.trainers import SupervisedTrainer
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
KINDS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": SHARDED, "zero3": ZERO3}
BF16 = {"bf16": SHARDED | {"ACCELERATE_MIXED_PRECISION": "bf16"}}
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
        output_dir=output_dir, max_steps=3, per_device_train_batch_size=4 // ranks,
        mini_batch_size=4 // ranks * changes.get("num_generations", 1), learning_rate=1e-3, critic_learning_rate=1e-3,
        weight_decay=0.01, ptx_coeff=0.5, max_new_tokens=6,
        save_steps=1, save_total_limit=None, disable_tqdm=True, guidance_rollouts=0,
    )  # fmt: skip
    algorithm = PPOLag(threshold=-0.2, window=0, delay=0)
    run = OnlineTrainer(
        roles, algorithm, algorithm.constraint(LogDual(0.1, 1.0, 5.0)), PROMPTS,
        OnlineArguments(**(defaults | changes)), demonstrations=DEMONSTRATIONS,
    )  # fmt: skip
    if greedy:
        drawn = roles.generate
        roles.generate = lambda x, n, sampling: drawn(x, n, replace(sampling, temperature=0.0))  # type: ignore[method-assign]
    return run


def launch(models: Path, folder: Path, number: int, kind: str = "ddp", target: Any = None, **changes: Any) -> list[int]:
    """A run on so many processes; their exit codes. A run that hangs is killed and fails the test."""
    serve("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, number, port, kind, str(models), str(folder)) for rank in range(number)]
    processes = [CONTEXT.Process(target=target or run_rank, args=args, kwargs=changes) for args in arguments]
    for process in processes:
        process.start()
    end = time.monotonic() + 600
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {number} processes hang"
    return [process.exitcode or 0 for process in processes]


def run_rank(rank: int, ranks: int, port: int, kind: str, models: str, output_dir: str, **changes: Any) -> None:
    """A whole run as one rank; the main one leaves the weights of every role that trains in weights.pt, and one that is
    alone those it began with in start.pt."""
    torch.set_num_threads(1)
    die_at = changes.pop("die_at", None)
    _environment(rank, ranks, port, kind)
    if die_at is not None and rank == ranks - 1:
        _die_at(die_at)
    run = trainer(models, output_dir, ranks, **changes)
    passes: list[int] = []  # rows of each pass of the policy that takes gradients
    run.roles.models["policy"].get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: passes.extend([len(kwargs["inputs_embeds"])] if torch.is_grad_enabled() else []),
        with_kwargs=True,
    )
    if ranks == 1:
        Path(output_dir).mkdir(exist_ok=True)
        torch.save(whole_tree(run.roles.state_dict()), Path(output_dir) / "start.pt")
    with Sent() as sent:
        run.train(resume_from_checkpoint=True)
    (Path(output_dir) / f"sent-{rank}.json").write_text(json.dumps(sent.bytes))
    (Path(output_dir) / f"passes-{rank}.json").write_text(json.dumps(passes))
    weights = whole_tree(run.roles.state_dict(), keep=rank == 0)
    if rank == 0:
        torch.save(weights, Path(output_dir) / "weights.pt")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def train_stages(
    rank: int,
    ranks: int,
    port: int,
    kind: str,
    models: str,
    output_dir: str,
    runs: Mapping[str, tuple[str, Sequence[str]]],
    die_at: int | None = None,
) -> None:
    """Supervised stages one after the other, on four rows a step of which some have no picture, however many ranks.

    runs: name of a folder to a stage and its settings. die_at: the last rank is killed in this step.
    """
    torch.set_num_threads(1)
    _environment(rank, ranks, port, kind)
    if die_at is not None and rank == ranks - 1:
        _die_in_loss(die_at)
    for name, (stage, chosen) in runs.items():
        quick = ["max_steps=3", "learning_rate=1e-3", "save_steps=2", "logging_steps=1"]
        quick.append(f"per_device_train_batch_size={4 // ranks}")
        settings = load_settings(None, [*(f"{stage}.{x}" for x in quick), *chosen])
        train_stage(stage, Path(models) / "base", Path(output_dir) / name, settings)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def train_stage(stage: str, base: Path, folder: Path, settings: Settings) -> None:
    pairs = comparisons(8)
    for i in (0, 4):
        pairs[i] = replace(pairs[i], prompt=replace(pairs[i].prompt, images=()))
    if stage == "sft":
        train_sft(pairs, pairs[:5], base, folder, *of(settings, "sft"))
    elif stage == "direct":
        train_direct(DPO(), pairs, pairs[:5], base, folder, *of(settings, "direct"), base)
    elif stage == "guard":
        rows = [LabelledResponse(prompt=pair.prompt, response=r) for pair in pairs for r in pair.responses]
        harmless = [replace(pair.prompt, text="what is it?", category=None, benign=True) for pair in pairs]
        rows += [LabelledResponse(prompt=p, response=Response(text="a key.", safe=True)) for p in harmless]
        # severity is a mean over the unsafe rows of a rank
        train_guard(
            rows,
            rows,
            base,
            folder,
            *of(settings, "guard"),
            options=GuardOptions(severity_weight=0, calibration_share=0.3),
        )
    else:
        train_preference_model(stage, pairs, pairs[:5], base, folder, *of(settings, stage))  # type: ignore[arg-type]


def _environment(rank: int, ranks: int, port: int, kind: str) -> None:
    """What `accelerate launch` tells a process."""
    smooth_adamw()
    os.environ |= {"ACCELERATE_USE_CPU": "true"} | ((KINDS | COPIED | BF16)[kind] if ranks > 1 else {})
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _die_in_loss(step: int) -> None:
    real = SupervisedTrainer.compute_loss

    def fatal(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step and self.model.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)

    SupervisedTrainer.compute_loss = fatal  # type: ignore[method-assign]


def _die_at(step: int) -> None:
    """This process is killed where it begins to update in the given step, while the others go on."""
    real = Updater.update

    def fatal(self: Updater, rollout: Any, advantages: Any, now: int) -> dict[str, float]:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, rollout, advantages, now)

    Updater.update = fatal  # type: ignore[method-assign]
