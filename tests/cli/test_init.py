import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from test_cli import error, run

from safe_rlhf_v.cli.init import fitted
from safe_rlhf_v.config import load_settings

ROOT = Path(__file__).parents[2]
RECIPES = {p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}


def test_init_writes_every_recipe_and_replaces_none(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    result = run("init", folder)
    assert result.exit_code == 0, result.output
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml")} == RECIPES
    assert load_settings(folder / "own_data.yaml") == load_settings(ROOT / "configs" / "own_data.yaml")
    assert f"doctor --config {folder / 'own_data.yaml'}" in result.output
    assert "is there already" in error("init", folder)


@pytest.mark.parametrize(("gpus", "want"), [(4, ("MULTI_GPU", 4, False)), (0, ("MULTI_CPU", 2, True))])
def test_ddp_fits_the_machine(gpus: int, want: tuple[str, int, bool]) -> None:
    text = (ROOT / "configs" / "accelerate" / "ddp.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(fitted(text, gpus))
    assert (found["distributed_type"], found["num_processes"], found["use_cpu"]) == want


def test_a_wheel_holds_recipes_and_types(tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs", "safe_rlhf_v", "beavertails_v", "guard"):
        (copy / name).symlink_to(ROOT / name)
    built = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    if "No module named 'setuptools'" in built.stderr:
        pytest.skip("needs setuptools")
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(tmp_path / built.stdout.split()[-1]).namelist()
    assert {f"safe_rlhf_v/recipes/{name}" for name in RECIPES} <= set(names)
    assert {f"{package}/py.typed" for package in ("beavertails_v", "safe_rlhf_v", "guard")} <= set(names)
