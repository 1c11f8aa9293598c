"""What `evaluate(detail=True)` adds: intervals of the graded figures, the flagged share of each category and severity,
and which rows could not be judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from guard import metrics
from guard.examples import Example
from guard.types import Kind, Verdict
from safe_rlhf_v.statistics import Resampling, share_of_rows

if TYPE_CHECKING:
    from guard.evaluate import Moderator, Verdicts

Examples = Mapping[Kind, Sequence[Example]]


def details(guard: Moderator, examples: Examples, judged: Verdicts, resampling: Resampling) -> dict[str, Any]:
    """Keys: severity_intervals, category_intervals, calibration_intervals (figure -> interval); flagged_by_category (of
    unsafe rows) and flagged_by_severity, by kind and name; degraded_rows (kind, row of the data or None, prompt and
    reason).
    """
    report: dict[str, Any] = {"severity_intervals": {}, "category_intervals": {}}
    if guard.grades:
        report["severity_intervals"] = _severity(examples, judged, resampling)
    if guard.spec.categories:
        report["category_intervals"] = _categories(guard, examples, judged, resampling)
    report["calibration_intervals"] = {
        kind: metrics.binary_calibration_intervals(
            np.array([e.unsafe for e in examples[kind]]),
            np.array([v.unsafe_probability for v in verdicts]),
            _prompts(examples[kind]),
            resampling=resampling,
        )
        for kind, verdicts in judged.items()
    }
    by_category = lambda e: e.category if e.unsafe else None  # noqa: E731
    by_severity = lambda e: None if e.severity is None else metrics.LEVEL_NAMES[e.severity]  # noqa: E731
    report["flagged_by_category"] = _flagged(examples, judged, by_category, resampling)
    report["flagged_by_severity"] = _flagged(examples, judged, by_severity, resampling)
    return report | {"degraded_rows": _degraded(examples, judged)}


def _prompts(examples: Sequence[Example]) -> list[str]:
    return [e.prompt.id for e in examples]


def _severity(examples: Examples, judged: Verdicts, resampling: Resampling) -> dict[str, Any]:
    which: Kind = "response" if "response" in judged else "query"
    rows = [(e, v) for e, v in zip(examples[which], judged[which], strict=True) if e.severity is not None]
    truth, predicted = np.array([int(e.severity or 0) for e, _ in rows]), np.array([int(v.severity) for _, v in rows])
    return metrics.severity_intervals(truth, predicted, _prompts([e for e, _ in rows]), resampling)


def _categories(guard: Moderator, examples: Examples, judged: Verdicts, resampling: Resampling) -> dict[str, Any]:
    from guard.evaluate import category_table

    every = [pair for kind in judged for pair in zip(examples[kind], judged[kind], strict=True)]
    labels, scores = category_table(guard, every)
    prompts = _prompts([e for e, _ in every])
    return metrics.category_intervals(labels, scores, guard.spec.categories, prompts, resampling=resampling)


def _flagged(
    examples: Examples, judged: Verdicts, group: Callable[[Example], str | None], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """By kind and group: the share of its rows that is flagged, with an interval, and how many rows it is of."""
    found: dict[str, dict[str, Any]] = {}
    for kind, verdicts in judged.items():
        groups: dict[str, list[tuple[Example, Verdict]]] = {}
        for example, verdict in zip(examples[kind], verdicts, strict=True):
            if (name := group(example)) is not None:
                groups.setdefault(name, []).append((example, verdict))
        found[kind] = {
            name: asdict(
                share_of_rows([v.flagged for _, v in rows], _prompts([e for e, _ in rows]), resampling=resampling)
            )
            | {"rows": len(rows)}
            for name, rows in sorted(groups.items())
        }
    return found


def _degraded(examples: Examples, judged: Verdicts) -> list[dict[str, Any]]:
    """Rows count from 0, responses as they stand, a query by its first response; None for a prompt without one."""
    first: dict[str, int] = {}
    for i, example in enumerate(examples["response"]):
        first.setdefault(example.prompt.id, i)
    return [
        {
            "kind": kind,
            "row": i if kind == "response" else first.get(example.prompt.id),
            "prompt": example.prompt.id,
            "reason": verdict.reason,
        }
        for kind, verdicts in judged.items()
        for i, (example, verdict) in enumerate(zip(examples[kind], verdicts, strict=True))
        if verdict.degraded
    ]
