"""How far a stage is, read from what it has written so far."""

from __future__ import annotations

import re
from pathlib import Path

STEP = re.compile(r'\{"step": (\d+),')


def share_of_steps(folder: Path, steps: int | None) -> float | None:
    """How far a stage is, by the last step in its metrics.jsonl; None where its length is not known."""
    file = folder / "metrics.jsonl"
    if not steps or steps < 1 or not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines[-2:]):  # the last may be half written
        if step := STEP.match(line):
            return min(1.0, float(step.group(1)) / steps)
    return None
