"""Checkpoints that are whole or not there at all.

A checkpoint is written beside its place, brought to the disk, then renamed. A kill or a full disk leaves at worst a
`checkpoint-N.tmp`, which nobody reads; the checkpoint before it stays until the new one stands.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from beavertails_v.errors import UserError
from safe_rlhf_v.config_io import flatten
from safe_rlhf_v.vlm.weights import DamagedFile, damage, read_json, read_tensors, read_torch, require_complete

log = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)$")
STATE, WEIGHTS, OPTIMIZERS, RNG = "trainer_state.json", "trainable.safetensors", "optimizers.pt", "rng.pt"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used, or must not be. The message says why, and what to do."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    whole = [
        path for path in Path(output_dir).glob("checkpoint-*") if NAME.match(path.name) and (path / STATE).is_file()
    ]
    return sorted(whole, key=step_of)


def newest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are all whole, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if damage(path) is None), None)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Unfinished ones are not looked at.

    A damaged one is passed over and named. Raises CheckpointError where there are damaged ones alone: to begin anew
    would throw work away that may only need to be copied once more. A kill may leave a state that has no end.
    """
    found = newest(output_dir)
    damaged = [path for path in checkpoints(output_dir) if found is None or step_of(path) > step_of(found)]
    if found is None and (lost := [path for path in damaged if _ended(path)]):
        raise CheckpointError(
            f"{damage(lost[-1])}; there is no whole checkpoint to go on from: delete {lost[-1].name} to begin anew, or "
            "add --overwrite"
        )
    if damaged and os.environ.get("RANK", "0") == "0":
        instead = f"{found} is taken in its place" if found else "the run begins anew"
        log.warning(f"warning: {damage(damaged[-1])}; {instead}")
    return found


def _ended(checkpoint: Path) -> bool:
    """Whether the state, which is written last, is whole."""
    try:
        require_complete(checkpoint / STATE)
    except DamagedFile:
        return False
    return True


@contextmanager
def resuming(checkpoint: str | Path) -> Iterator[None]:
    """Around what reads a checkpoint: a file damaged inside is an error that names the checkpoint."""
    try:
        yield
    except (ValueError, EOFError, KeyError, SafetensorError, UnpicklingError, RuntimeError) as error:
        if isinstance(error, CheckpointError | torch.OutOfMemoryError):
            raise
        why = damage(Path(checkpoint)) or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint} cannot be read ({why}): delete it to go on from the one before, or add --overwrite"
        ) from error


def step_of(checkpoint: Path) -> int:
    match = NAME.match(checkpoint.name)
    if match is None or not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint: its name must be checkpoint-<step>, with {STATE} inside")
    return int(match[1])


def start_writing(final: Path) -> Path:
    """An empty folder beside `final` to write into; what a killed run left there is removed."""
    beside = final.with_name(final.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def publish(beside: Path, final: Path) -> None:
    """Bring every file to the disk, then give the folder its name. A folder that has the name already is replaced."""
    for path in [*beside.rglob("*"), beside]:
        _sync(path)
    if final.exists():
        _remove(final)
    os.replace(beside, final)
    _sync(final.parent)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` at the end, or vanishes when an error (a full disk) comes through."""
    beside = start_writing(final)
    try:
        yield beside
        publish(beside, final)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        error.add_note(f"while writing {final}; what was saved before it is whole")
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(checkpoint: Path) -> None:
    """Take the name away first: a kill half-way through must not leave half a checkpoint under a whole one's name."""
    doomed = checkpoint.with_name(checkpoint.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def prune(output_dir: Path, save_total_limit: int | None) -> None:
    """Remove the oldest checkpoints beyond the limit, and what killed runs left behind."""
    for path in [*output_dir.glob("checkpoint-*.tmp"), *output_dir.glob("checkpoint-*.old")]:
        shutil.rmtree(path)
    if save_total_limit is not None:
        for path in checkpoints(output_dir)[:-save_total_limit]:
            _remove(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """trainable: everything that trains, by name; optimizers: their states and their schedules'; rng: the generators of
    each rank; state: JSON values (step, multiplier, costs, place in the data, settings).
    """

    trainable: Mapping[str, Tensor]
    optimizers: Mapping[str, Any]
    rng: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]


def write(folder: Path, contents: Contents) -> None:
    save_file({name: x.detach().cpu().contiguous() for name, x in contents.trainable.items()}, folder / WEIGHTS)
    torch.save(dict(contents.optimizers), folder / OPTIMIZERS)
    torch.save(list(contents.rng), folder / RNG)
    (folder / STATE).write_text(json.dumps(contents.state, allow_nan=False), encoding="utf-8")


def read(folder: Path) -> Contents:
    """What `write` wrote. Tensors come on the CPU. Raises CheckpointError for a folder that is not a checkpoint."""
    step_of(folder)
    with resuming(folder):
        return Contents(
            trainable=read_tensors(folder / WEIGHTS),
            # mapped, not read: ranks that each take a part of a large state share one copy of it
            optimizers=read_torch(folder / OPTIMIZERS, mmap=True),
            rng=read_torch(folder / RNG),
            state=read_json(folder / STATE),
        )


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: frozenset[str]) -> None:
    """Raises CheckpointError naming every setting that differs from the checkpoint's, but for those that may."""
    old, new = flatten(saved), flatten(json.loads(json.dumps(now)))
    names = sorted(name for name in (old.keys() | new.keys()) - may_differ if old.get(name) != new.get(name))
    if names:
        lines = [f"  {name}: {old.get(name)!r} in the checkpoint, {new.get(name)!r} now" for name in names]
        raise CheckpointError(
            "the settings are not those of the checkpoint:\n" + "\n".join(lines) + "\n"
            "Put them back to resume, or start anew in another output_dir."
        )
