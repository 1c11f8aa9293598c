"""Two processes, DDP, FSDP2 or ZeRO-3, do what one does: on CPUs, over gloo."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import launch
from rounding import close

from safe_rlhf_v.config import SettingsError
from safe_rlhf_v.distributed import communication as traffic
from safe_rlhf_v.distributed import fsdp2 as sharding
from safe_rlhf_v.distributed import zero3
from safe_rlhf_v.training import checkpoint
from safe_rlhf_v.training.runtime import ShuffledIndices, read_metrics
from safe_rlhf_v.vlm.backbone import load_backbone

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'"
)
CUT = ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)]
kinds = pytest.mark.parametrize("kind", ["ddp", *CUT])
Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    ranks.make_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert launch(models, folder, 1) == [0]
    return folder


@pytest.fixture(scope="module", params=["ddp", *CUT, *ranks.COPIED])
def together(request: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"together-{request.param}-")
    assert launch(models, folder, 2, request.param) == [0, 0]
    return folder


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")]


def test_metrics_multiplier_and_gradients_are_those_of_one_process(alone: Path, together: Path) -> None:
    """Norms of the gradients of all three networks, losses, costs and the multiplier of every step are in the rows."""
    rows = metrics_of(alone)
    assert len(rows) == 3 and len({row["multiplier"] for row in rows}) == 3
    assert all(row[f"{name}_grad_norm"] > 0 for row in rows for name in ("policy", "reward_value", "cost_value"))
    close(metrics_of(together), rows)


def test_weights_are_those_of_one_process(alone: Path, together: Path, models: Path) -> None:
    one, two = (torch.load(folder / "weights.pt") for folder in (alone, together))
    close(two, one, torch.load(alone / "start.pt"))
    before = load_backbone(models / "base").state_dict()["lm_head.weight"]
    assert (one["policy.lm_head.weight"] - before).abs().max() > 1e-4  # it moved


def test_checkpoints_are_those_of_one_process(alone: Path, together: Path) -> None:
    """So how many processes wrote a checkpoint, and whether the models were cut, does not show in it."""
    one, two = (checkpoint.read(checkpoint.checkpoint_path(folder, 2)) for folder in (alone, together))
    close(dict(two.trainable), dict(one.trainable), torch.load(alone / "start.pt"))
    assert two.optimizers.keys() == one.optimizers.keys() == {"policy", "reward_value", "cost_value"}
    for name in one.optimizers:
        mine, theirs = (x.optimizers[name]["optimizer"]["state"] for x in (one, two))
        close({i: theirs[i] for i in mine}, mine)
    settings = [x.state.pop("settings") for x in (one, two)]
    assert [len(x.state.pop("halved")) for x in (one, two)] == [1, 2]  # of each process
    assert settings[0]["rows"] == settings[1]["rows"]
    close(two.state, one.state)


def test_the_saved_policy_loads_and_is_what_was_trained(together: Path) -> None:
    saved = load_backbone(together / "policy").state_dict()
    weights = torch.load(together / "weights.pt")
    assert torch.equal(saved["lm_head.weight"], weights["policy.lm_head.weight"])


def test_the_traffic_model_counts_what_sharded_ranks_send(together: Path, models: Path) -> None:
    sent = json.loads((together / "sent-0.json").read_text())
    if not sent["reduce_scatter"]:  # DDP, or a copy on each: no weights move
        assert sent["all_gather"] < 1000
        return
    model = load_backbone(models / "base")
    language = sum(p.numel() for p in model.model.language_model.parameters())
    output = model.lm_head.weight.numel()
    work = traffic.Work(updates=1, steps=1, demonstrations=1)
    expected = traffic.fsdp2(work, 4 * (language + output), 4 * language)
    # three steps; beside the model are heads, and padding of tensors that two ranks cannot halve
    if "zero3" not in together.name:  # which gathers checkpoints by the same calls
        assert sent["all_gather"] == pytest.approx(3 * expected.all_gather, rel=0.01)
    scattered = 3 * (expected.reduce_scatter + 2 * 4 * output)  # policy and demonstrations reach the output layer
    assert sent["reduce_scatter"] == pytest.approx(scattered, rel=0.01)


@kinds
def test_two_processes_write_what_one_resumes(alone: Path, models: Path, tmp_path: Path, kind: str) -> None:
    assert launch(models, tmp_path, 2, kind, max_steps=2) == [0, 0]
    assert launch(models, tmp_path, 1, max_steps=3) == [0]
    close(metrics_of(tmp_path), metrics_of(alone))
    close(*(torch.load(path) for path in (tmp_path / "weights.pt", alone / "weights.pt", alone / "start.pt")))


@pytest.mark.parametrize("kind", CUT)
def test_one_process_writes_what_two_sharded_ones_resume(alone: Path, models: Path, tmp_path: Path, kind: str) -> None:
    assert launch(models, tmp_path, 1, max_steps=2) == [0]
    assert launch(models, tmp_path, 2, kind) == [0, 0]
    close(metrics_of(tmp_path), metrics_of(alone))


@pytest.mark.parametrize("kind", CUT)
def test_recomputed_activations_of_cut_models_change_nothing(
    alone: Path, models: Path, tmp_path: Path, kind: str
) -> None:
    assert launch(models, tmp_path, 2, kind, recompute=True) == [0, 0]
    close(metrics_of(tmp_path), metrics_of(alone))
    close(*(torch.load(path) for path in (tmp_path / "weights.pt", alone / "weights.pt", alone / "start.pt")))


@pytest.mark.parametrize("kind", CUT)
def test_cut_models_read_a_prompt_with_each_sample_and_one_process_once(
    models: Path, tmp_path: Path, kind: str
) -> None:
    """Each rank's forwards are as many as the others', whatever its rows share."""
    options: dict[str, Any] = dict(num_generations=2, max_steps=1)
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(models, one, 1, **options) == [0]
    assert launch(models, two, 2, kind, **options) == [0, 0]
    close(metrics_of(two), metrics_of(one))
    passes = [json.loads((folder / "passes-0.json").read_text()) for folder in (one, two)]
    assert passes == [[4, 8] * 2, [4] * 2], "of the samples and of the demonstrations; cut, whole rows"


def test_cut_models_compute_in_bfloat16_over_float32_weights(alone: Path, models: Path, tmp_path: Path) -> None:
    assert launch(models, tmp_path, 2, "bf16", max_steps=1) == [0, 0]
    one, two = metrics_of(alone)[0], metrics_of(tmp_path)[0]
    assert two["ptx_loss"] == pytest.approx(one["ptx_loss"], rel=2e-2) and two["ptx_loss"] != pytest.approx(
        one["ptx_loss"], rel=1e-6
    )
    saved = load_backbone(tmp_path / "policy").state_dict()
    before = load_backbone(models / "base").state_dict()
    for name in ("lm_head.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        step = saved[name] - before[name]
        assert saved[name].dtype == torch.float32 and 1e-5 < step.abs().max() < 2e-3  # AdamW moves by learning_rate


@needs_deepspeed
def test_zero3_refuses_weights_other_than_float32() -> None:
    backbone = torch.nn.Linear(1, 1)
    backbone.dtype = torch.bfloat16  # type: ignore[assignment]
    with pytest.raises(SettingsError, match="model.dtype: torch.bfloat16 is not cut by ZeRO-3"):
        zero3.Zero3.root(None, backbone)  # type: ignore[arg-type]


def shares(seed: int) -> list[list[bool]]:
    """Whether each of the two prompts of a rank has pictures, in three rollouts of two ranks: each sees all four."""
    drawn = ShuffledIndices(len(ranks.PROMPTS), seed)
    return [[bool(ranks.PROMPTS[i].images) for i in drawn.take(2)] for _ in range(6)]


@kinds
def test_ranks_with_and_without_pictures_and_of_unequal_length_do_not_wait_for_each_other(
    models: Path, tmp_path: Path, kind: str
) -> None:
    seed = next(seed for seed in range(100) if [True, True] in shares(seed))  # and beside it a rank without pictures
    assert launch(models, tmp_path, 2, kind, greedy=False, max_new_tokens=12, seed=seed) == [0, 0]


@kinds
def test_a_killed_rank_is_an_error_of_the_others_and_not_a_hang(models: Path, tmp_path: Path, kind: str) -> None:
    codes = launch(models, tmp_path, 2, kind, die_at=2)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    state = json.loads((tmp_path / "checkpoint-1" / checkpoint.STATE).read_text())
    assert state["step"] == 1
    assert launch(models, tmp_path, 2, kind, max_steps=2) == [0, 0]  # and the run goes on


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not DeepSpeed"),  # the stages that are not cut by it
        (ranks.SHARDED | {"FSDP_VERSION": "1"}, "only FSDP2"),
        (ranks.SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}, "without CPU off-loading"),
        (ranks.SHARDED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        (ranks.SHARDED | {"ACCELERATE_MIXED_PRECISION": "fp16"}, "use bf16 or no"),
    ],
)
def test_launches_that_are_not_supported_are_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        sharding.sharding_of_launch()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "only ZeRO stage 3"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file is not read"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "without off-loading"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "without off-loading"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: false"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: no"),
        ({}, "pip install 'safe-rlhf-v\\[deepspeed\\]'"),
    ],
)
def test_launches_of_deepspeed_that_are_not_supported_are_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where it is not installed
    for name, value in (ranks.ZERO3 | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        zero3.zero3_of_launch()
