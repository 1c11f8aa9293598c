"""`doctor`: what it finds, what it says, its exit code; and the recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny_models
import yaml
from click.testing import Result
from typer.testing import CliRunner

from beavertails_v.picture_world import write
from safe_rlhf_v.cli import app
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.planning import doctor as work
from safe_rlhf_v.planning.footprint import meta_model

CONFIGS = Path(__file__).parents[2] / "configs"
OTHERS = {"compare.yaml", "compare_all.yaml", "own_data.yaml"}
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name not in OTHERS)
# what each recipe's header says it is for
MEANT_FOR = {
    "beavertails_v_llava7b.yaml": ["--memory", "80"],
    "qwen2_5_vl_3b_qlora.yaml": ["--memory", "24"],
    "qwen2_5_vl_7b_qlora.yaml": ["--memory", "24"],
    "qwen2_5_vl_3b_lora.yaml": ["--memory", "80"],
    "qwen2_5_vl_7b_lora.yaml": ["--memory", "80"],
    "qwen2_5_vl_3b_full.yaml": ["--memory", "80", "--gpus", "8", "--fsdp2"],
    "qwen2_5_vl_7b_full.yaml": ["--memory", "80", "--gpus", "8", "--fsdp2"],
    "smolvlm_256m.yaml": ["--memory", "8"],
}
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, its config alone, and data."""
    root = tmp_path_factory.mktemp("doctor")
    tiny_models.save("llava", root / "model")
    (root / "config").mkdir()
    (root / "config" / "config.json").write_text((root / "model" / "config.json").read_text())
    write(root / "data", train=8, evaluation=4, seed=0)
    return {name: root / name for name in ("model", "config", "data", "run")}


def settings(here: dict[str, Path], **changes: Any) -> list[str]:
    named = {"model.path": here["config"], "data.path": here["data"], "output_dir": here["run"]} | changes
    return [f"{key}={value}" for key, value in ({"model.max_prompt_length": 64} | named).items()]


def test_a_run_that_can_work_passes_without_weights(here: dict[str, Path]) -> None:
    result = doctor("--json", "--memory", 1, *settings(here))
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["passed"]
    outcomes = {check["name"]: check for check in found["checks"]}
    assert (
        outcomes["versions"]["outcome"] == "ok"
        and outcomes["data"]["detail"] == "train 8 pairs, 0 left out, evaluation 4 pairs, 0 left out"
    )
    assert outcomes["model"]["outcome"] == "warning" and "no weights" in outcomes["model"]["detail"]
    assert [stage["stage"] for stage in found["stages"]] == ["sft", "reward", "cost", "policy"]
    for stage in found["stages"]:
        assert stage["fits"] and stage["peak"] == sum(stage["held"].values()) + max(stage["passing"].values())


def test_the_table_says_what_fits(here: dict[str, Path]) -> None:
    result = doctor("--memory", 1, "--stage", "policy", *settings(here, **{"model.path": here["model"]}))
    assert result.exit_code == 0
    for word in ("checks", "versions", "llava", "policy optimizer", "one of these at a time", "fits"):
        assert word in result.stdout


def test_a_stage_that_does_not_fit_fails(tmp_path: Path, here: dict[str, Path]) -> None:
    folder = shapes.save("HuggingFaceTB/SmolVLM-256M-Instruct", tmp_path)
    more = settings(here, **{"model.path": "nowhere/model"})
    result = doctor("--json", "--memory", 0.9, "--stage", "sft", "--model-config", folder, *more)
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["passed"]
    assert [stage["fits"] for stage in found["stages"]] == [False]
    assert all(check["outcome"] != "error" for check in found["checks"])


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        ({"model.path": "nowhere"}, "model", "nowhere"),
        ({"data.path": "''"}, "data", "data.path is not set"),
        ({"model.quantization": "4bit"}, "device", "bitsandbytes"),
        ({"model.max_prompt_length": "null"}, "policy", "--prompt-tokens"),
        ({"output_dir": "/proc/nothing"}, "output_dir", "/proc/nothing"),
    ],
)
def test_what_cannot_work_is_named(
    here: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], check: str, message: str
) -> None:
    monkeypatch.setattr(work, "installed", lambda package: False)
    result = doctor("--json", "--stage", "policy", *settings(here, **changes))
    failed = [x for x in json.loads(result.stdout)["checks"] if x["outcome"] == "error"]
    assert result.exit_code == 1
    assert [x["name"] for x in failed] == [check] and message in failed[0]["detail"]


def test_an_unknown_stage_is_a_mistake_of_the_command(here: dict[str, Path]) -> None:
    assert doctor("--stage", "polcy", *settings(here)).exit_code == 2


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_the_shapes_are_those_of_the_published_models(name: str, tmp_path: Path) -> None:
    model = meta_model(shapes.save(name, tmp_path), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(shapes.PUBLISHED[name], rel=0.01)


@recipes
def test_recipes_parse_and_say_whether_they_were_measured(recipe: Path) -> None:
    assert load_settings(recipe).model.path in shapes.SHAPES
    header = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "NOT MEASURED" in header or "Measured" in header
    assert " ".join(MEANT_FOR[recipe.name]) in header  # the command that predicts it


def predicted(recipe: Path, folder: Path, *stages: str) -> dict[str, Any]:
    chosen = [part for stage in stages for part in ("--stage", stage)]
    options = [*MEANT_FOR[recipe.name], *chosen, "--model-config", folder, "--json", "--config", recipe]
    return dict(json.loads(doctor(*options, f"output_dir={folder}").stdout))


@pytest.fixture
def _bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "installed", lambda package: True)


@recipes
@pytest.mark.usefixtures("_bitsandbytes")
def test_recipes_are_predicted(recipe: Path, tmp_path: Path) -> None:
    """With two layers, for time."""
    folder = shapes.save(load_settings(recipe).model.path, tmp_path, layers=2)
    found = predicted(recipe, folder, "reward", "policy")
    assert {stage["stage"]: stage["fits"] for stage in found["stages"]} == {"reward": True, "policy": True}
    assert found["passed"]


@pytest.mark.usefixtures("_bitsandbytes")
def test_six_full_models_of_7b_fit_eight_gpus_and_not_one(tmp_path: Path) -> None:
    recipe = CONFIGS / "qwen2_5_vl_7b_full.yaml"
    folder = shapes.save(load_settings(recipe).model.path, tmp_path)
    (stage,) = predicted(recipe, folder, "policy")["stages"]
    # 7.6 billion parameters without the tower: six models and three pairs of moments, 12 x 4 bytes, on eight GPUs
    assert sum(stage["held"].values()) == pytest.approx(7.6156e9 * 48 / 8 + 0.6766e9 * 2, rel=0.01)
    assert stage["fits"]
    whole = doctor("--memory", 80, "--stage", "policy", "--model-config", folder, "--json", "--config", recipe)
    assert whole.exit_code == 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert str(settings.distributed_type).rpartition(".")[2] == yaml.safe_load(path.read_text())["distributed_type"]
    assert settings.num_processes == ("gpu" if settings.num_machines == 1 else 8 * settings.num_machines)
