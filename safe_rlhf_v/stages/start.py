"""What is looked at before a stage begins, without torch."""

from __future__ import annotations

from pathlib import Path

from safe_rlhf_v.config import Settings, SettingsError


def require_start(settings: Settings, stage: str) -> None:
    """Raises SettingsError where the model that a stage starts from is named by a path, and nothing is there."""
    made = Path(settings.output_dir, "sft", "done.json").is_file()
    key, name = "model.path", settings.model.path
    if stage != "sft":
        key, name = ("model.start", settings.model.start) if settings.model.start else (key, "" if made else name)
    path = Path(name)
    local = path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or (path.parent.is_dir() and "/" in name)
    if name and local and not path.exists():
        raise SettingsError(f"{key} = {name}: no such folder; give the folder or hub id of a model")
