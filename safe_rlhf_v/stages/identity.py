"""What a stage's work depends on: settings, data and models, by which other work in its folder is known.

stage.json holds it, flat: {"reward.learning_rate": 3e-05, "start": folder, "start made": {file: hash, ...}, ...}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_rlhf_v.config import DataSection, Settings, SettingsError
from safe_rlhf_v.config_io import flatten
from safe_rlhf_v.stages.fingerprint import absolute, data_files, file_hash, model_files

STAGE = "stage.json"
MADE = " made"  # "start made" tells what stood in the folder that "start" names: the folder itself may have moved
# What may change between a killed run and its continuation without changing the result.
BOOKKEEPING = {
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_steps",
    "report_to",
    "per_device_eval_batch_size",
}
FILES = ("data.columns", "guard.policy")  # small files that decide what labels and verdicts mean
PATHS = ("model.path", "model.start", "data.path", "guard.benign", "guard.path", "direct.reference")


def identity(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    """The settings a stage's result depends on, flat: {"reward.learning_rate": 3e-05, ...}; local paths absolute."""
    tree = settings.model_dump(mode="json", include={"seed", "model", "data", *sections})
    flat = {key: value for key, value in flatten(tree).items() if key.rpartition(".")[2] not in BOOKKEEPING}
    return {key: absolute(value) if key in PATHS or _is_file(key, value) else value for key, value in flat.items()}


def _is_file(key: str, value: Any) -> bool:
    """Whether the value names a file of the user's, not a column map or a policy that comes with the package."""
    return key in FILES and bool(value) and Path(value).is_file()


def made(wanted: Mapping[str, Any], data: DataSection) -> dict[str, Any]:
    """What stands in the folders that the values name: {"start made": {"config.json": hash, ...}, ...}."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        if key in ("data.path", "guard.benign") and value:
            found[key] = data_files(value, data)
        elif _is_file(key, value):
            found[key] = {Path(value).name: file_hash(Path(value))}
        elif isinstance(value, str) and Path(value).is_dir():
            found[key] = model_files(Path(value))
    return {key + MADE: files for key, files in found.items() if files}


def refuse_other(folder: Path, wanted: Mapping[str, Any]) -> None:
    file = folder / STAGE
    if not file.is_file():
        return
    before = read_record(file, "with which settings it was made is not known; choose another output_dir")
    for key in (key for key in wanted if key.endswith(MADE) and key in before and before[key] != wanted[key]):
        raise SettingsError(_other_files(folder, key.removesuffix(MADE), before[key], wanted))
    same = {key for key in wanted if key + MADE in wanted and before.get(key + MADE) == wanted[key + MADE]}  # moved
    settled = same | {key for key in {**before, **wanted} if key.endswith(MADE)}
    changed = [key for key in {**before, **wanted} if key not in settled and before.get(key) != wanted.get(key)]
    if changed:
        listed = ", ".join(f"{key} ({before.get(key)} then, {wanted.get(key)} now)" for key in changed[:4])
        raise SettingsError(
            f"{folder} was made with other settings: {listed}{' ...' * (len(changed) > 4)}; "
            "choose another output_dir, or throw it away: delete it, or add --overwrite where the command has it"
        )


def _other_files(folder: Path, key: str, before: Any, wanted: Mapping[str, Any]) -> str:
    now = wanted[key + MADE]
    old = before if isinstance(before, Mapping) else {}
    names = sorted(name for name in {**old, **now} if old.get(name) != now.get(name))
    data = key in ("data.path", "guard.benign")
    what = "the data" if data else f"the file {key!r}" if key in FILES else f"the model {key!r}"
    return (
        f"{folder} was made with other files: {what} changed since, {wanted[key]}: "
        f"{', '.join(names[:4])}{' ...' * (len(names) > 4)}; choose another output_dir, or throw it away: delete it, "
        "or add --overwrite where the command has it"
    )


def read_record(file: Path, otherwise: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        why = "empty, as after a power cut" if not file.stat().st_size else "damaged"
        raise SettingsError(f"{file} is {why}: {otherwise}; or add --overwrite to begin anew") from None
