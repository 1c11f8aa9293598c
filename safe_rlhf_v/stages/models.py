"""Which models a stage starts from or is trained against, by the settings and what stands in output_dir."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_rlhf_v.config import DataSection, ModelSection, SettingsError
from safe_rlhf_v.processes import process_state
from safe_rlhf_v.stages.folder import read_done
from safe_rlhf_v.vlm.kind import SCORERS, require_answering, require_scorer
from safe_rlhf_v.vlm.preflight import preflight


def require(value: str | None, key: str, what: str) -> str:
    """The setting's value, or a SettingsError that says which setting is missing."""
    if not value:
        raise SettingsError(f"{key} is not set: give {what}, in the settings file or as {key}=...")
    return value


def look_first(data: DataSection, model: str) -> None:
    """What can be said of a stage's data and model before any data or weights are read."""
    require(data.path, "data.path", "a folder, file or hub id with preference data")
    preflight(model)


def base_model(model: ModelSection) -> str:
    """The untrained model."""
    path = require(model.path, "model.path", "a folder or hub id of a vision-language model")
    return require_answering(path, "model.path")


def start_model(model: ModelSection, output_dir: str | Path) -> str:
    """What the later stages start from: model.start, else a finished <output_dir>/sft, else model.path."""
    if model.start:
        return require_answering(model.start, "model.start")
    sft = Path(output_dir) / "sft"
    return str(sft) if read_done(sft) else base_model(model)


def trained(output_dir: str | Path, stage: str, given: str | None, key: str) -> str:
    """Folder of a trained model: the one given, else that of the finished stage, else a SettingsError.

    Raises ModelError where the one given is of another kind.
    """
    if given:
        return require_scorer(given, stage, key) if stage in SCORERS else require_answering(given, key)
    folder = Path(output_dir) / stage
    if not read_done(folder):
        raise SettingsError(
            f"{folder} holds no finished {stage} model: run `safe-rlhf-v train {stage}` first, or set {key}"
        )
    return str(folder)


def judges(output_dir: str | Path, section: Any, key: str) -> dict[str, str]:
    """{"reward_model": folder, "cost_model": folder} as the section called `key` names them, else those trained."""
    kinds = {"reward_model": "reward", "cost_model": "cost"}
    return {name: trained(output_dir, kind, getattr(section, name), f"{key}.{name}") for name, kind in kinds.items()}


def device() -> Any:
    """This process's device."""
    return process_state().device


def one_process(command: str) -> None:
    """Raises SettingsError under a launcher of several processes."""
    if (n := process_state().num_processes) > 1:
        raise SettingsError(f"{command} runs as one process, not {n}: start it without accelerate launch")
