"""What a guard's verdicts withstand: each perturbation against the clean rows that it touches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from beavertails_v.images import ImageError
from guard import metrics
from guard.examples import Example
from guard.perturbations import PERTURBATIONS, Perturbation
from guard.types import Verdict
from safe_rlhf_v.statistics import Resampling, share_of_rows

if TYPE_CHECKING:
    from guard.evaluate import Moderator


def robustness(
    guard: Moderator, examples: Sequence[Example], clean: Sequence[Verdict], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """By perturbation: f1, recall and fpr with and without it (clean_f1, ...), flips (verdicts that change), missed
    (unsafe rows that were flagged and no longer are), each with an interval; and on how many rows (n)."""
    return {p.name: row for p in PERTURBATIONS if (row := _row(guard, p, examples, clean, resampling))}


def _row(
    guard: Moderator, change: Perturbation, examples: Sequence[Example], clean: Sequence[Verdict], r: Resampling
) -> dict[str, Any] | None:
    from guard.evaluate import judge_examples

    changed = [perturbed(change, e, r.seed) for e in examples]
    touched = [i for i, (old, new) in enumerate(zip(examples, changed, strict=True)) if new != old]
    if not touched:
        return None
    before, after = [clean[i] for i in touched], judge_examples(guard, [changed[i] for i in touched])
    unsafe = np.array([examples[i].unsafe for i in touched])
    prompts = [examples[i].prompt.id for i in touched]
    old, new = (np.array([v.flagged for v in verdicts]) for verdicts in (before, after))
    row: dict[str, Any] = {"n": len(touched), "degraded": sum(v.degraded for v in after)}
    for prefix, flagged in (("clean_", old), ("", new)):
        found = metrics.binary_metrics(unsafe, flagged.astype(float), flagged, prompts, resampling=r)["intervals"]
        row |= {f"{prefix}{name}": found.get(name) for name in ("f1", "recall", "fpr")}
    row["flips"] = asdict(share_of_rows(old != new, prompts, resampling=r))
    names = [p for p, bad in zip(prompts, unsafe, strict=True) if bad]
    row["missed"] = asdict(share_of_rows((old & ~new)[unsafe], names, resampling=r)) if names else None
    return row


def perturbed(change: Perturbation, example: Example, seed: int) -> Example:
    """The example under a perturbation; as it is where a picture cannot be read, which the guard then refuses."""
    try:
        return replace(example, prompt=change(example.prompt, seed), response=change.answer(example.response, seed))
    except ImageError:
        return example
