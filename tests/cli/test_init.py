import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from commands import error, run
from torch.distributed.run import determine_local_world_size

from safe_rlhf_v.config import load_settings
from safe_rlhf_v.planning.recipes import fitted

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


@pytest.mark.parametrize(("gpus", "want"), [(4, ("MULTI_GPU", 4, False)), (0, ("MULTI_GPU", 2, True))])
def test_ddp_fits_the_machine(gpus: int, want: tuple[str, int, bool]) -> None:
    text = (ROOT / "configs" / "accelerate" / "ddp.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(fitted(text, gpus))
    assert (found["distributed_type"], found["num_processes"], found["use_cpu"]) == want


@pytest.mark.parametrize(("more", "count"), [([], "gpu"), (["--num_processes", "2"], "2")])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_launch_takes_every_gpu_unless_told(name: str, more: list[str], count: str) -> None:
    """torchrun knows `gpu` for as many processes as there are GPUs."""
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    args = launch.launch_command_parser().parse_args(["--config_file", str(file), *more, "script.py"])
    args, *_ = launch._validate_launch_command(args)
    prepare_multi_gpu_env(args)
    assert args.multi_gpu == (name == "ddp") and args.nproc_per_node == count


def test_torchrun_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert determine_local_world_size("gpu") == 4


WHO = """
from safe_rlhf_v.processes import process_state
state = process_state()
print(f"rank {state.process_index} of {state.num_processes} on {state.device.type}", flush=True)
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the file is of a machine without GPUs")
def test_processes_that_accelerate_starts_without_gpus_know_each_other(tmp_path: Path) -> None:
    """A real launch, a few seconds: each would else do all the work and write over the other."""
    text = (ROOT / "configs" / "accelerate" / "ddp.yaml").read_text(encoding="utf-8")
    (tmp_path / "ddp.yaml").write_text(fitted(text, 0) + "main_process_port: 0\n")
    (tmp_path / "who.py").write_text(WHO)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "ddp.yaml", "who.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert sorted(re.findall(r"rank \d of \d on cpu", ended.stdout)) == [
        "rank 0 of 2 on cpu",
        "rank 1 of 2 on cpu",
    ], ended.stderr


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
