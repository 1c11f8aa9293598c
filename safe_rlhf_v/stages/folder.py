"""A stage's folder: finished work is skipped, killed work goes on, other work is not overwritten, two runs do not meet.

stage.json says with which settings, data and models a stage began, done.json that it ended, with what, and how long it
took. While a stage works, its process holds a lock on the file `.lock`, which ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from beavertails_v.errors import UserError
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.stages.card import Card, write_card
from safe_rlhf_v.stages.fingerprint import absolute
from safe_rlhf_v.stages.identity import STAGE, identity, made, read_record, refuse_other

T = TypeVar("T")
LOCK, DONE, LEFT_OUT = ".lock", "done.json", "left_out.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage's work leaves for the one who writes its folder, beside the files of its model.

    measured: for done.json and whoever asked. base: the model that the card names. shown: what the card shows of what
    was measured, else all. parts: folders below that hold models of their own, with a metrics.json, and their bases.
    """

    measured: dict[str, Any]
    base: str
    shown: Mapping[str, Any] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)


Work = Callable[[Path], StageResult | dict[str, Any]]
"""Does a stage in its folder. A dictionary is what it measured, where it makes no model."""


def run_stage(
    name: str,
    settings: Settings,
    sections: Sequence[str],
    work: Work,
    *,
    card: Card | None = None,
    overwrite: bool = False,
    **inputs: Any,
) -> dict[str, Any]:
    """Do `work(folder)` unless it is done; returns what it measured.

    sections: those of the settings that the result depends on, beside model, data and seed. card: of the model that the
    work makes. inputs: what else the result depends on, such as the model it starts from. Raises SettingsError where
    the folder holds work of other settings, other data or other models, or where another run is at work in it.
    """
    folder = Path(settings.output_dir) / name
    given = {key: absolute(str(value)) for key, value in inputs.items()}
    wanted = by_main(lambda: (flat := identity(settings, sections) | given) | made(flat, settings.data))
    if not overwrite and (measured := by_main(lambda: _kept(folder, wanted))) is not None:
        return measured
    require_writable(folder)
    with at_work(folder):
        if overwrite:
            _throw_away(folder)
        elif (measured := by_main(lambda: _kept(folder, wanted))) is not None:  # another run ended it meanwhile
            return measured
        return _work(folder, wanted, lambda: record(work(folder), folder, card, settings))


def _kept(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished stage measured, or None. Raises SettingsError for work that is not this one's."""
    refuse_other(folder, wanted)
    if done := read_done(folder):
        plain(f"{folder.name}: done before, {folder} is kept")
        return dict(done["measured"])
    return None


def _work(folder: Path, wanted: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if main_process():
        write_json(folder / STAGE, wanted)
    from safe_rlhf_v.training.encode import write_left_out

    start = time.monotonic()
    try:
        measured = work()
        if main_process():
            write_json(folder / DONE, {"seconds": round(time.monotonic() - start, 1), "measured": measured})
    except Exception as error:
        if main_process() and getattr(error, "left_out", None):
            write_left_out(folder, error.left_out)  # type: ignore[attr-defined]
        if main_process() and {file.name for file in folder.iterdir()} <= {STAGE, LOCK, LEFT_OUT}:
            (folder / STAGE).unlink(missing_ok=True)  # nothing was done: a mistyped path does not stand in the way
        if is_full_disk(error):
            raise _full_disk(folder) from error
        raise
    return measured


def record(result: StageResult | dict[str, Any], folder: Path, card: Card | None, settings: Settings) -> dict[str, Any]:
    """What was measured, once the main process has written settings.yaml and the card, of each part as well."""
    if isinstance(result, dict):
        return result
    if main_process() and card is not None:
        shown = result.measured if result.shown is None else result.shown
        for name, base, measured in [("", result.base, shown), *_parts(folder, result.parts)]:
            settings.save(folder / name / "settings.yaml")
            write_card(folder / name, card, base, settings.data, settings.seed, measured)
    return result.measured


def _parts(folder: Path, parts: Mapping[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each part's name, base and metrics.json."""
    for name, base in parts.items():
        yield name, base, json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises SettingsError where another process has it, on this machine or, where the file
    system can say so, on another. Of several ranks the main one holds it, for all of them.
    """
    handle = by_main(lambda: _lock(folder))
    try:
        yield
    finally:
        if main_process():
            os.close(handle)


def _lock(folder: Path) -> int:
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(handle, 200).decode(errors="replace") or "of an unknown number"
        os.close(handle)
        raise SettingsError(
            f"{folder}: another run is at work here (process {who}); wait for its end, or choose another output_dir"
        ) from None
    except OSError as error:  # a network file system without locks
        plain(f"warning: {folder} cannot be locked ({error.strerror}): let no other run work in it")
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def require_writable(folder: Path) -> None:
    """Makes the folder. Raises SettingsError where nothing can be written to it, before hours of work and not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder}: {str(error.strerror).lower()}; choose another output_dir") from None
    if not os.access(folder, os.W_OK):
        raise SettingsError(f"{folder}: cannot be written to; choose another output_dir")


def _throw_away(folder: Path) -> None:
    """Done by the main process, while the others wait: they would take the old work for theirs."""
    if main_process():
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _wait_for_all()


def by_main(look: Callable[[], T]) -> T:
    """What the main process finds in a folder, or its error, for every rank.

    Ranks that looked for themselves could see a folder before and after another run's change, and wait for each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return look()
    from accelerate.utils import broadcast_object_list

    from safe_rlhf_v.processes import process_state

    found: list[Any] = [None, None]
    if main_process():
        try:
            found[0] = look()
        except (UserError, OSError) as error:
            found[1] = error
    process_state()
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def _wait_for_all() -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from safe_rlhf_v.processes import process_state

        process_state().wait_for_everyone()


def read_done(folder: Path) -> dict[str, Any] | None:
    """{"seconds", "measured"} of a finished stage, or None."""
    file = folder / DONE
    if not file.is_file():
        return None
    return read_record(file, "delete it to have the stage end once more from its newest checkpoint")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    replace_text(path, json.dumps(value, indent=2, default=str) + "\n")


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that nothing more can be written: in words of torch, too."""
    while error is not None:
        words = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in words:
            return True
        if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in words or "unexpected pos" in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full_disk(folder: Path) -> OSError:
    from safe_rlhf_v.training.checkpoint import newest

    whole = newest(folder)
    on = f"it goes on from {whole.name}" if whole else "it begins anew"
    return OSError(errno.ENOSPC, f"no space left on the device; free some and run again: {on}", str(folder))


def main_process() -> bool:
    """Whether this is the only process of a stage, or the first of several."""
    return os.environ.get("RANK", "0") == "0"
