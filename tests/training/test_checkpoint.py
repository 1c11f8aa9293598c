"""A checkpoint is whole or not there at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_rlhf_v.training import checkpoint
from safe_rlhf_v.training.checkpoint import CheckpointError, Contents


def contents(step: int, **state: Any) -> Contents:
    return Contents(
        trainable={"w": torch.full((3,), float(step))},
        optimizers={"policy": {"step": torch.tensor(step)}},
        rng=[{"torch": torch.get_rng_state()}],
        state={"step": step, **state},
    )


def save(folder: Path, step: int) -> Path:
    final = checkpoint.checkpoint_path(folder, step)
    with checkpoint.atomic_directory(final) as inside:
        checkpoint.write(inside, contents(step))
    return final


def test_round_trip(tmp_path: Path) -> None:
    read = checkpoint.read(save(tmp_path, 3))
    assert torch.equal(read.trainable["w"], torch.full((3,), 3.0))
    assert read.optimizers["policy"]["step"].item() == 3
    assert torch.equal(read.rng[0]["torch"], torch.get_rng_state())
    assert read.state == {"step": 3}


def test_latest_goes_by_number_and_overlooks_unfinished_ones(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "checkpoint-11.tmp").mkdir()
    (tmp_path / "checkpoint-12").mkdir()  # a name without its state
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint.latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("what", ["save_file", "torch.save", "os.replace", "_sync"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = save(tmp_path, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"safe_rlhf_v.training.checkpoint.{what}", full)
        with pytest.raises(OSError, match="No space left") as error:
            save(tmp_path, 2)
    assert "checkpoint-2; what was saved before it is whole" in error.value.__notes__[0]
    assert checkpoint.latest_checkpoint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]  # the half is gone, its space is free
    assert checkpoint.read(before).state == {"step": 1}
    save(tmp_path, 2)
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2.tmp").mkdir()
    (tmp_path / "checkpoint-2.tmp" / "stray").touch()
    assert not (save(tmp_path, 2) / "stray").exists()
    (tmp_path / "checkpoint-7.tmp").mkdir()
    checkpoint.prune(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_files_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = checkpoint._sync, checkpoint.os.replace
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (events.append(path.name), sync(path))[1])
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    save(tmp_path, 4)
    renamed = events.index("rename")
    files = {checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.OPTIMIZERS, checkpoint.RNG, "checkpoint-4.tmp"}
    assert set(events[:renamed]) == files and events[renamed + 1 :] == [tmp_path.name]


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.read(tmp_path)


def test_changed_settings_are_named_with_both_values() -> None:
    saved = {"arguments": {"learning_rate": 0.1, "max_steps": 5, "report_to": []}, "rows": {"a": 1}}
    now = {"arguments": {"learning_rate": 0.2, "max_steps": 9, "report_to": ()}, "rows": {"a": 1}, "extra": True}
    with pytest.raises(CheckpointError) as error:
        checkpoint.refuse_changes(saved, now, frozenset({"arguments.max_steps"}))
    assert "arguments.learning_rate: 0.1 in the checkpoint, 0.2 now" in str(error.value)
    assert "extra: None in the checkpoint, True now" in str(error.value)
    assert "max_steps" not in str(error.value) and "report_to" not in str(error.value)


def test_equal_settings_pass() -> None:
    settings = {"a": {"b": (1, 2), "c": 0.1}}
    checkpoint.refuse_changes({"a": {"b": [1, 2], "c": 0.1}}, settings, frozenset())
