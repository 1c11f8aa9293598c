"""Supervised stages on two processes, cut by FSDP2 or under DDP, do what one does: on CPUs, over gloo."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models
import torch
from comparisons import comparisons
from ranks import launch
from rounding import close
from safetensors.torch import load_file
from sections import of

from guard.classifier import Guard
from safe_rlhf_v.algorithms.c_dpo import CDPO
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.direct.train import train_direct
from safe_rlhf_v.training.checkpoint import latest_checkpoint
from safe_rlhf_v.training.runtime import read_metrics
from safe_rlhf_v.training.supervised import train_sft
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ("sft.responses=safer", "sft.eval_steps=2")),  # of one length: a rank's loss is a mean over tokens
    "sft-lora": ("sft", ("sft.responses=safer", "sft.use_lora=true")),
    "reward": ("reward", ("reward.use_lora=false", "reward.gradient_checkpointing=language")),
    # an adapter of rank 1 and the head have one row: nothing of them is on the second process
    "cost-lora": ("cost", ("model.lora.r=1", "cost.gradient_accumulation_steps=2")),
    "direct-lora": ("direct", ("direct.use_lora=true",)),
    "guard": ("guard", ("guard.use_lora=false",)),
}
BFLOAT16 = dict.fromkeys(("sft", "cost-lora"), ("model.dtype=bfloat16",))
LOADERS: dict[str, Any] = {"reward": HeadedModel, "cost": HeadedModel, "guard": Guard}
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save("llava", folder / "base")
    return folder


def train(models: Path, folder: Path, number: int, *names: str, kind: str = "fsdp2", **more: Any) -> list[int]:
    runs = {name: RUNS[name] for name in names}
    return launch(models, folder, number, kind, ranks.train_stages, runs=runs, **more)


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert train(models, folder, 1, *RUNS) == [0]
    return folder


@pytest.fixture(scope="module")
def cut(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    assert train(models, folder, 2, *RUNS) == [0, 0]
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    """What is logged of all processes; the main one logs a loss's parts of its own rows."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    logged = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k in kept or k.startswith("eval_")} for row in logged]


def same(folder: Path, expected: Path, models: Path) -> None:
    """Every tensor that a run left: the model or adapter, heads, precomputed columns, the checkpoint's weights."""
    base = load_file(models / "base" / "model.safetensors")
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    for file in files:
        close(load_file(folder / file), load_file(expected / file), base, str(file))


@every_run
def test_losses_gradients_and_measures_are_those_of_one_process(alone: Path, cut: Path, name: str) -> None:
    logged = rows(alone / name)
    assert len({row["loss"] for row in logged if "loss" in row}) >= 2
    close(rows(cut / name), logged)
    measured = [json.loads((folder / name / "metrics.json").read_text()) for folder in (alone, cut)]
    for run in measured:
        run.get("evaluation", {}).pop("calibration_id", None)  # names the weights
    close(measured[1], measured[0])


@every_run
def test_the_saved_folder_is_whole_and_that_of_one_process(alone: Path, cut: Path, models: Path, name: str) -> None:
    same(cut / name, alone / name, models)
    loader = LOADERS.get(RUNS[name][0])
    model: Any = load_backbone(cut / name) if loader is None else loader.from_pretrained(cut / name)
    state = getattr(model, "model", model).state_dict() if loader is Guard else model.state_dict()
    before = load_backbone(models / "base").state_dict()
    weight = "model.language_model.layers.0.mlp.up_proj"
    if name == "cost-lora":
        moved = state[f"backbone.{weight}.lora_B.default.weight"]
    else:
        moved = state[f"{'' if loader is None else 'backbone.'}{weight}.weight"] - before[f"{weight}.weight"]
    assert moved.abs().max() > 1e-5


@every_run
def test_optimizers_in_checkpoints_are_those_of_one_process(alone: Path, cut: Path, name: str) -> None:
    one, two = (torch.load(folder / name / "checkpoint-3" / "optimizer.pt") for folder in (alone, cut))
    close(two, one)


def test_a_killed_rank_ends_the_run_and_two_or_one_go_on(alone: Path, cut: Path, models: Path, tmp_path: Path) -> None:
    """Bit for bit on two. A checkpoint of cut weights is one of whole weights."""
    codes = train(models, tmp_path, 2, "reward", die_at=3)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1
    assert latest_checkpoint(tmp_path / "reward") == tmp_path / "reward" / "checkpoint-2"
    shutil.copytree(tmp_path / "reward", tmp_path / "one" / "reward")
    assert train(models, tmp_path, 2, "reward") == [0, 0]
    assert rows(tmp_path / "reward") == rows(cut / "reward")
    for file in ("model.safetensors", "heads.safetensors"):
        assert (tmp_path / "reward" / file).read_bytes() == (cut / "reward" / file).read_bytes()
    assert train(models, tmp_path / "one", 1, "reward") == [0]
    close(rows(tmp_path / "one" / "reward"), rows(alone / "reward"))
    same(tmp_path / "one" / "reward", alone / "reward", models)


def test_bf16_of_a_section_is_that_of_the_launch(alone: Path, models: Path, tmp_path: Path) -> None:
    runs = {"reward": ("reward", (*RUNS["reward"][1], "reward.bf16=true"))}
    assert launch(models, tmp_path, 2, "fsdp2", ranks.train_stages, runs=runs) == [0, 0]
    one, two = (rows(folder / "reward")[0]["loss"] for folder in (alone, tmp_path))
    assert two == pytest.approx(one, rel=2e-2) and two != pytest.approx(one, rel=1e-6)


def test_weights_are_gathered_in_bfloat16_and_saved_as_they_are(alone: Path, models: Path, tmp_path: Path) -> None:
    """Float32 weights, bfloat16 weights, and adapters, always in float32, on bfloat16 ones."""
    runs = {name: (stage, (*chosen, *BFLOAT16.get(name, ()))) for name, (stage, chosen) in RUNS.items()}
    runs = {name: runs[name] for name in ("reward", "sft", "cost-lora")}
    assert launch(models, tmp_path, 2, "bf16", ranks.train_stages, runs=runs) == [0, 0]
    for name in runs:
        one, two = (rows(folder / name)[0]["loss"] for folder in (alone, tmp_path))
        assert two == pytest.approx(one, rel=2e-2) and two != pytest.approx(one, rel=1e-6)
    weight = "model.language_model.layers.0.mlp.up_proj"
    reward, cost = (HeadedModel.from_pretrained(tmp_path / name).state_dict() for name in ("reward", "cost-lora"))
    assert reward[f"backbone.{weight}.weight"].dtype == torch.float32
    assert cost[f"backbone.{weight}.lora_B.default.weight"].abs().max() > 1e-5
    saved = load_file(tmp_path / "sft" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}


def test_under_ddp_two_processes_do_what_one_does(alone: Path, models: Path, tmp_path: Path) -> None:
    assert train(models, tmp_path, 2, "cost-lora", kind="ddp") == [0, 0]
    close(rows(tmp_path / "cost-lora"), rows(alone / "cost-lora"))
    same(tmp_path / "cost-lora", alone / "cost-lora", models)


@pytest.mark.parametrize(
    ("environment", "chosen", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "sft is cut by FSDP2, not DeepSpeed"),
        (ranks.SHARDED, ("sft.freeze_vision=false",), "sft.freeze_vision: false"),
        (ranks.SHARDED, ("sft.optim=adamw_bnb_8bit",), "sft.optim 'adamw_bnb_8bit'"),
        (ranks.SHARDED, ("sft.use_lora=true", "model.quantization=4bit"), "model.quantization"),
    ],
)
def test_what_cannot_be_cut_is_named(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    chosen: tuple[str, ...],
    message: str,
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SettingsError, match=message):
        train_sft(comparisons(4), comparisons(2), models / "base", tmp_path, *of(load_settings(None, chosen), "sft"))


def test_a_method_that_draws_answers_is_not_cut(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    chosen = load_settings()
    with pytest.raises(SettingsError, match="direct.algorithm: CDPO draws answers"):
        train_direct(CDPO(threshold=0.0), comparisons(4), [], models / "base", tmp_path, *of(chosen, "direct"))
