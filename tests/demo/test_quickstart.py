"""The demo at a size that says nothing of its figures: what runs when, and that a killed one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safe_rlhf_v.config import SettingsError
from safe_rlhf_v.demo.quickstart import Demo, quickstart_settings, shared_by_ranks

ROOT = Path(__file__).parents[2]


def test_parts_wait_for_what_they_read(tmp_path: Path) -> None:
    settings = quickstart_settings(None, [f"output_dir={tmp_path}"])
    steps = Demo(settings=settings).steps
    assert {name: step.after for name, step in steps.items()} == {
        "data": (), "start": (), "sft": ("data", "start"), "reward": ("sft",), "cost": ("sft",), "guard": ("sft",),
        "policy": ("reward", "cost"),
    }  # fmt: skip
    given = quickstart_settings(None, [f"output_dir={tmp_path}", "data.path=d", "model.path=m"])
    assert list(Demo(settings=given).steps) == ["sft", "reward", "cost", "guard", "policy"]


def test_ranks_share_the_batches(tmp_path: Path) -> None:
    settings = quickstart_settings(None, [])
    for stage in ("sft", "policy"):
        section, shared = getattr(settings, stage), getattr(shared_by_ranks(settings, stage, 2), stage)
        assert 2 * shared.per_device_train_batch_size == section.per_device_train_batch_size
        assert shared.learning_rate == section.learning_rate
    assert 2 * shared_by_ranks(settings, "policy", 2).policy.mini_batch_size == settings.policy.mini_batch_size
    odd = quickstart_settings(None, ["policy.mini_batch_size=3"])
    with pytest.raises(SettingsError, match=r"policy.mini_batch_size = 3"):
        shared_by_ranks(odd, "policy", 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the stages of a killed demo run to their end")
def test_a_killed_demo_goes_on(tmp_path: Path) -> None:
    """Some 30 seconds: every stage on a tiny world, killed without warning while several stages run."""
    sizes = ["--train", "64", "--evaluation", "24", f"output_dir={tmp_path}", "policy.max_steps=1"]
    sizes += ["policy.per_device_train_batch_size=8", "policy.mini_batch_size=4", "policy.max_new_tokens=4"]
    sizes += ["sft.max_steps=1", "reward.max_steps=2", "cost.max_steps=2", "guard.max_steps=2"]
    sizes += ["generation.max_new_tokens=4", "policy.guidance_rollouts=0"]
    command = [sys.executable, "-m", "safe_rlhf_v.cli", "quickstart", *sizes]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "logs" / "reward.log").is_file():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    stands = (tmp_path / "sft" / "done.json").read_text()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "done before  sft" in second.stdout and "done  policy" in second.stdout
    assert (tmp_path / "sft" / "done.json").read_text() == stands
    assert json.loads((tmp_path / "report.json").read_text())["base"]
    assert "mean cost keeps the bound" in second.stdout
