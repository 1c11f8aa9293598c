"""What the training functions take of a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_rlhf_v.config import Settings
from safe_rlhf_v.stages.build import setup
from safe_rlhf_v.stages.folder import StageResult, record
from safe_rlhf_v.stages.stages import STAGES


def of(settings: Settings, stage: str) -> tuple[Any, Any]:
    """The stage's section, and what every training shares."""
    return getattr(settings, stage), setup(settings)


def recorded(settings: Settings, stage: str, folder: Path, base: str | Path, measured: dict[str, Any]) -> None:
    """What the stage writes about the model that a training function left in its folder."""
    record(StageResult(measured=measured, base=str(base)), folder, STAGES[stage].card, settings)
