"""What is looked at before a stage begins, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def guard_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What training measured of a guard, with the figures of its evaluation by which one tells whether it is of use."""
    report = measured.get("evaluation") or {}
    rates = ("f1", "precision", "recall", "fpr", "recall_at_1_fpr", "auprc", "n", "unsafe")
    heads = {kind: {k: report[kind][k] for k in rates} for kind in ("query", "response") if report.get(kind)}
    single = {k: report.get(k) for k in ("severity_kappa", "over_refusal", "blind_f1", "degraded")}
    counts = {k: v for k, v in measured.items() if isinstance(v, int)}
    return counts | {"judges": " and ".join(measured.get("kinds", ())), **heads, "held out": single}
