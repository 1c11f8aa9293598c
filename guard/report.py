"""Several guards on one labelled data set: judged one after another, into evaluation.json and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.schema import Prompt
from beavertails_v.sets import ResponseSet
from guard.classifier import SPEC_FILE
from guard.evaluate import Moderator, evaluate
from guard.generative import PREFIX, open_guard
from guard.page import render
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.training.encode import dropped
from safe_rlhf_v.vlm.kind import require_answering


class GuardNameError(UserError, ValueError):
    """The guards to measure are named wrongly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """blind: grey pictures too. perturbations: under each. samples, level, seed: of intervals."""

    blind: bool = True
    perturbations: bool = False
    samples: int = 1000
    level: float = 0.95
    seed: int = 0


def guard_names(given: Iterable[str]) -> list[str]:
    """Names of comma-separated lists, each once. Raises GuardNameError for one that can be no guard."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise GuardNameError(f"guard {twice[0]} is named twice; name each once")
    if not names:
        raise GuardNameError("name at least one guard: the folder of a trained one, or generative:MODEL")
    for name in names:
        if name.startswith(PREFIX):
            require_answering(name.removeprefix(PREFIX))
        elif not (Path(name) / SPEC_FILE).is_file():
            raise GuardNameError(f"{name} has no {SPEC_FILE}: it is not a saved guard; for any model: {PREFIX}{name}")
    return names


def measure(
    names: Sequence[str],
    data: ResponseSet,
    out: str | Path,
    *,
    benign: Sequence[Prompt] = (),
    measuring: Measuring | None = None,
    load: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate each guard on `data`; writes evaluation.json and report.html after each, and returns what they hold.

    names: as `open_guard` takes them. benign: harmless queries beside those of the data. load: options of loading.
    """
    measuring = measuring or Measuring()
    report: dict[str, Any] = {"version": 1, "data": describe(data), "measuring": asdict(measuring), "guards": {}}
    for name in names:
        report["guards"][name] = measured(open_guard(name, **(load or {})), data, benign, measuring)
        write(report, out)
    return report


def measured(guard: Moderator, data: ResponseSet, benign: Sequence[Prompt], measuring: Measuring) -> dict[str, Any]:
    """One guard's figures, with the file and row of what it could not judge."""
    start = time.perf_counter()
    found = evaluate(guard, data, benign=benign, detail=True, **asdict(measuring))
    for entry in found["degraded_rows"]:
        file, row = ("", None) if entry["row"] is None else data.origin(entry["row"])
        entry |= {"file": file, "row": row}
    return found | {"seconds": time.perf_counter() - start}


def describe(data: ResponseSet) -> dict[str, Any]:
    """What was measured on, and the rows that loading left out of it."""
    source = data.report
    return {
        "source": source.source,
        "split": source.split,
        "fingerprint": source.fingerprint,
        "responses": len(data),
        "prompts": len(data.prompts()),
        "left_out": [asdict(row) for row in dropped(data)],
    }


def write(report: Mapping[str, Any], out: str | Path) -> Path:
    """evaluation.json and report.html of a folder, made if missing; returns the page's path."""
    folder = Path(out)
    replace_text(folder / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    replace_text(folder / "report.html", render(report))
    return folder / "report.html"
