"""One run of a comparison as a folder: what is written for its process to read, and whether it is done.

Every run is one ordinary command with one ordinary settings file, runs/<method>[/bound<b>]/seed<s>/run.yaml below
output_dir, so that whoever wants to repeat or change one does it by hand.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safe_rlhf_v.comparison.settings import flat_overrides
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.jobs.progress import share_of_steps
from safe_rlhf_v.jobs.scheduler import Job
from safe_rlhf_v.stages.folder import write_json
from safe_rlhf_v.stages.identity import BOOKKEEPING

MEASURING = ("evaluation", "generation", "guard")
"""Sections that a training stage does not depend on: changed, a run is measured again and not trained again."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One method, seed and bound. bound: requested fall of the mean cost; None leaves the setting as it is. swept: it
    belongs to the sweep alone. model: what is measured."""

    method: str
    title: str
    stage: str
    seed: int
    folder: Path
    settings: Settings
    model: str
    bound: float | None = None
    swept: bool = False
    needs: tuple[str, ...] = ()
    """Names of the runs whose models this one reads."""

    @property
    def name(self) -> str:
        at = "" if not self.swept else f" at {self.bound:g}"
        return f"{self.method}{at} seed {self.seed}"

    @property
    def flat(self) -> dict[str, str]:
        """The settings that a result depends on: {"policy.beta": "0.1", ...}."""
        flat = (o.split("=", 1) for o in flat_overrides(self.settings.model_dump(mode="json")))
        return {key: value for key, value in flat if key.rpartition(".")[2] not in BOOKKEEPING}


def write_run(run: PlannedRun) -> None:
    """run.yaml and plan.json. Raises SettingsError where the folder holds a run of other settings."""
    file = run.folder / "run.yaml"
    if file.is_file() and (changed := _changed(run, replace(run, settings=load_settings(file)))):
        raise SettingsError(
            f"{run.folder} holds a run with other settings ({', '.join(changed[:4])}): choose another output_dir, "
            f"or delete that folder to run {run.name} again"
        )
    run.settings.save(file)
    known = {"method": run.method, "title": run.title, "stage": run.stage, "seed": run.seed, "requested": run.bound}
    plan = {**known, "swept": run.swept, "model": run.model, "identity": measuring_identity(run)}
    write_json(run.folder / "plan.json", plan)


def _changed(run: PlannedRun, before: PlannedRun) -> list[str]:
    """The settings that training depends on and that are not what they were."""
    old = before.flat
    return [k for k, v in run.flat.items() if k.partition(".")[0] not in MEASURING and old.get(k) != v]


def measuring_identity(run: PlannedRun) -> str:
    """Changes where a run has to be measured again: how it is measured, or what was trained."""
    tree = {**run.flat, "requested": str(run.bound), "swept": str(run.swept)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def run_job(run: PlannedRun) -> Job:
    """Train and measure in one process: to begin one costs as much as several rollouts of a small model."""
    folder = run.folder
    section = getattr(run.settings, run.stage, None)
    return Job(
        name=run.name,
        kind=f"run {run.method}",
        command=[sys.executable, "-m", "safe_rlhf_v.comparison.run", str(folder)],
        log=folder / "run.log",
        done=lambda: measured(folder),
        after=run.needs,
        progress=lambda: share_of_steps(folder / run.stage, getattr(section, "max_steps", None)),
    )


def infeasible(folder: Path) -> bool:
    """Whether an iterative stage found that its bound is out of reach: a result, though there is no model."""
    file = folder / "iterations.json"
    state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(state.get("one_shot", {}).get("verdict") == "infeasible")


def measured(folder: Path) -> bool:
    """Whether the run was measured as its plan.json says."""
    file = folder / "measured.json"
    if not file.is_file():
        return False
    plan: Mapping[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return bool(json.loads(file.read_text(encoding="utf-8")).get("identity") == plan["identity"])
