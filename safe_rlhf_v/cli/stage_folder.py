"""A stage's folder: finished work is skipped, killed work goes on, work of other settings is not overwritten.

stage.json says with which settings a stage began, done.json that it ended, with what, and how long it took.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_rlhf_v.cli.common import plain
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.files import replace_text

# What may change between a killed run and its continuation without changing the result.
BOOKKEEPING = {
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "report_to",
    "per_device_eval_batch_size",
}


def run_stage(
    name: str,
    settings: Settings,
    sections: Sequence[str],
    work: Callable[[Path], dict[str, Any]],
    *,
    overwrite: bool = False,
    **inputs: Any,
) -> dict[str, Any]:
    """Do `work(folder)` unless it is done; returns what it measured.

    sections: those of the settings that the result depends on, beside model, data and seed. inputs: what else it
    depends on, such as the model it starts from. Raises SettingsError where the folder holds work of other settings.
    """
    folder = Path(settings.output_dir) / name
    if overwrite:
        _throw_away(folder)
    wanted = identity(settings, sections) | {key: str(value) for key, value in inputs.items()}
    wanted |= {f"{key} made": made for key, value in inputs.items() if (made := _made(value))}
    _refuse_other(folder, wanted)
    require_writable(folder)
    if done := read_done(folder):
        plain(f"{name}: done before, {folder} is kept")
        return dict(done["measured"])
    if _main_process():
        write_json(folder / "stage.json", wanted)
    start = time.monotonic()
    try:
        measured = work(folder)
    except Exception:
        if _main_process() and [file.name for file in folder.iterdir()] == ["stage.json"]:
            (folder / "stage.json").unlink()  # nothing was done: a mistyped path does not stand in the way of the next
        raise
    if _main_process():
        write_json(folder / "done.json", {"seconds": round(time.monotonic() - start, 1), "measured": measured})
    return measured


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
    if folder.exists() and _main_process():
        shutil.rmtree(folder)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from safe_rlhf_v.models.processes import process_state

        process_state().wait_for_everyone()


def _made(source: Any) -> str | None:
    """Tells two trainings of an input stage in the same folder apart."""
    file = Path(str(source)) / "done.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else None


def identity(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    """The settings a stage's result depends on, flat: {"reward.learning_rate": 3e-05, ...}."""
    tree = settings.model_dump(mode="json", include={"seed", "model", "data", *sections})
    flat = _flatten(tree)
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in BOOKKEEPING}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _refuse_other(folder: Path, wanted: Mapping[str, Any]) -> None:
    file = folder / "stage.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
    if changed:
        listed = ", ".join(f"{key} ({before.get(key)} then, {wanted.get(key)} now)" for key in changed[:4])
        raise SettingsError(
            f"{folder} was made with other settings: {listed}{' ...' * (len(changed) > 4)}; "
            "choose another output_dir, or throw it away: delete it, or add --overwrite where the command has it"
        )


def read_done(folder: Path) -> dict[str, Any] | None:
    """{"seconds", "measured"} of a finished stage, or None."""
    file = folder / "done.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    replace_text(path, json.dumps(value, indent=2, default=str) + "\n")


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
