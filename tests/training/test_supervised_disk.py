"""A disk that is full, or a kill, while a supervised stage writes a checkpoint: the one before it stays whole."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import comparisons
from safetensors.torch import load_file
from sections import of

from safe_rlhf_v.config import load_settings
from safe_rlhf_v.training import trainers
from safe_rlhf_v.training.checkpoint import latest_checkpoint
from safe_rlhf_v.training.supervised import train_preference_model

SETTINGS = ["reward.max_steps=6", "reward.save_steps=2", "reward.per_device_train_batch_size=2"]


def run(base: str, folder: str) -> None:
    torch.set_num_threads(1)
    train_preference_model(
        "reward", comparisons(8), comparisons(2), base, folder, *of(load_settings(None, SETTINGS), "reward")
    )


def run_and_die(base: str, folder: str) -> None:
    """Killed with half of the second checkpoint's optimizer on the disk."""
    real, calls = torch.save, [0]

    def fatal(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        real(value, path, *args, **kwargs)
        calls[0] += str(path).endswith("optimizer.pt")
        if calls[0] == 2:
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = fatal
    run(base, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save("llava", tmp_path_factory.mktemp("base") / "llava"))


@pytest.fixture(scope="module")
def unbroken(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unbroken")
    run(base, str(folder))
    return load_file(folder / "adapter_model.safetensors")


def goes_on(base: str, folder: Path, unbroken: dict[str, torch.Tensor]) -> None:
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    run(base, str(folder))
    found = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(found[name], unbroken[name]) for name in unbroken)


def test_a_full_disk(
    base: str, unbroken: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainers.save_file, [0]

    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "save_file", full)
        with pytest.raises(OSError, match="No space left") as error:
            run(base, str(tmp_path))
    assert "checkpoint-4; what was saved before it is whole" in error.value.__notes__[0]
    assert not (tmp_path / "checkpoint-4").exists()  # its space is free again
    goes_on(base, tmp_path, unbroken)


def test_a_kill(base: str, unbroken: dict[str, torch.Tensor], tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(base, str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").is_dir()  # half of it
    goes_on(base, tmp_path, unbroken)
