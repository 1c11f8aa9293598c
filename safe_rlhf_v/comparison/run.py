"""One run of a comparison, as a process of its own: python -m safe_rlhf_v.comparison.run FOLDER

The folder's run.yaml and plan.json say what to train and what to measure. What is done is not done again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from safe_rlhf_v.comparison.measure import measure
from safe_rlhf_v.comparison.planned import infeasible
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.errors import user_errors
from safe_rlhf_v.stages.stages import STAGES


@user_errors
def main(folder: Path) -> None:
    """Train, unless that is done, then measure."""
    stage = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["stage"]
    if stage:
        train(folder, stage)
    measure(folder)


def train(folder: Path, stage: str) -> None:
    """What `safe-rlhf-v train <stage> --config FOLDER/run.yaml` does; a bound out of reach is a result."""
    try:
        STAGES[stage].run(load_settings(folder / "run.yaml"))
    except SettingsError:
        if not infeasible(folder / stage):
            raise


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
