"""`guard tune`: a policy file for a stated false-positive rate, and what to expect of it on new traffic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from beavertails_v.errors import UserError
from beavertails_v.schema import LabelledResponse, Prompt
from beavertails_v.sets import ResponseSet
from guard import metrics, tuning
from guard.classifier import Guard
from guard.evaluate import KINDS, judge_examples
from guard.examples import Example, examples_of
from guard.policy import KindPolicy, Policy
from guard.types import Kind, Verdict
from safe_rlhf_v.files import replacing
from safe_rlhf_v.statistics import Resampling
from safe_rlhf_v.training.encode import DataError

Rows = Sequence[tuple[Example, Verdict]]


class TuningError(UserError, ValueError):
    """Thresholds cannot be tuned as asked."""


def tune(
    guard: Guard,
    data: Sequence[LabelledResponse],
    max_fpr: float,
    *,
    benign: Sequence[Prompt] = (),
    seed: int = 0,
    samples: int = 1000,
) -> tuple[Policy, dict[Kind, dict[str, Any]]]:
    """The guard's policy with thresholds moved, and for each kind how they were chosen and what to expect.

    Half of the prompts, by their content and `seed`, choose the thresholds; the guard then judges the other half by the
    new policy. A kind that the guard does not judge, or without harmless rows in both halves, keeps its thresholds.
    Raises DataError where that leaves none.
    """
    found: dict[Kind, dict[str, Any]] = {}
    sides: dict[Kind, KindPolicy] = {"query": guard.policy.query, "response": guard.policy.response}
    held: dict[Kind, list[Example]] = {}
    for kind, examples in examples_of(data, benign).items():
        chosen, kept = halves(examples, seed)
        if guard.can_judge(kind) and all(any(not e.unsafe for e in half) for half in (chosen, kept)):
            rows = list(zip(chosen, judge_examples(guard, chosen), strict=True))
            sides[kind], found[kind] = tuned_side(sides[kind], rows, max_fpr)
            held[kind] = kept
    if not found:
        raise DataError(
            "no harmless rows, of a kind that this guard judges, in both halves of the data: nothing to tune"
        )
    before = guard.policy
    policy = before.model_copy(update={"query": sides["query"], "response": sides["response"]})
    guard.policy = policy
    for kind in KINDS:
        if kind in held:
            rows = list(zip(held[kind], judge_examples(guard, held[kind]), strict=True))
            old = before.query if kind == "query" else before.response
            found[kind] |= expectation(rows, old, Resampling(draws=samples, seed=seed))
    return policy, found


def tune_and_save(
    guard: Guard,
    data: ResponseSet,
    max_fpr: float,
    out: str | Path,
    *,
    benign: Sequence[Prompt] = (),
    seed: int = 0,
) -> dict[Kind, dict[str, Any]]:
    """`tune`, and a policy file that says what it was tuned on. Raises TuningError for a rate that is none."""
    if not 0 < max_fpr < 1:
        raise TuningError(f"--max-fpr {max_fpr:g}: give a rate above 0 and below 1, such as 0.01 for 1 %")
    policy, found = tune(guard, data, max_fpr, benign=benign, seed=seed)
    source = data.report
    record: dict[str, Any] = {
        "max_fpr": max_fpr,
        "confidence": tuning.CONFIDENCE,
        "data": {"source": source.source, "split": source.split, "fingerprint": source.fingerprint, "rows": len(data)},
        "benign_prompts": len(benign),
        "seed": seed,
        "calibration_id": guard.calibration.id,
    }
    record.update({str(kind): side for kind, side in found.items()})
    with replacing(out) as beside:
        policy.model_copy(update={"tuned": json.loads(json.dumps(record))}).save(beside)
    return found


def halves(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Each prompt wholly on one side, by its content."""
    first = [hashlib.sha256(f"{seed} {e.prompt.id}".encode()).digest()[0] % 2 == 0 for e in examples]
    return (
        [e for e, side in zip(examples, first, strict=True) if side],
        [e for e, side in zip(examples, first, strict=True) if not side],
    )


def tuned_side(policy: KindPolicy, rows: Rows, max_fpr: float) -> tuple[KindPolicy, dict[str, Any]]:
    """The rules of one kind, moved; by category where enough harmless prompts have it as their likeliest one."""
    needed = tuning.prompts_needed(max_fpr)
    groups: dict[str, list[tuple[Example, Verdict]]] = {}
    for example, verdict in rows:
        groups.setdefault(verdict.top_category or "", []).append((example, verdict))
    counts = {name: len({e.prompt.id for e, _ in own if not e.unsafe}) for name, own in groups.items() if name}
    enough = sorted(name for name, count in counts.items() if count >= needed)
    rest = [row for name, own in groups.items() if name not in enough for row in own]
    shifts = {name: _shift(policy, groups[name], max_fpr) for name in enough}
    if len({e.prompt.id for e, _ in rest if not e.unsafe}) >= needed:
        base = _shift(policy, rest, max_fpr)
    else:  # what is left alone could promise nothing: the most careful of what others can
        base = max([_shift(policy, rows, max_fpr), *shifts.values()], key=lambda shift: shift.shift)
    moved = tuning.moved_policy(policy, base.shift, {name: shift.shift for name, shift in shifts.items()})
    return moved, {
        **asdict(base),
        "promised": base.promised and all(shift.promised for shift in shifts.values()),
        "prompts_needed": needed,
        "categories": {name: asdict(shift) for name, shift in shifts.items()},
        "categories_with_too_few": {name: counts[name] for name in sorted(counts) if name not in enough},
    }


def _shift(policy: KindPolicy, rows: Rows, max_fpr: float) -> tuning.Shift:
    margins = [tuning.margin(policy, verdict) for _, verdict in rows]
    harmless = [i for i, (example, _) in enumerate(rows) if not example.unsafe]
    others = [m for m, (example, _) in zip(margins, rows, strict=True) if example.unsafe]
    return tuning.choose([margins[i] for i in harmless], [rows[i][0].prompt.id for i in harmless], max_fpr, others)


def expectation(rows: Rows, old: KindPolicy, resampling: Resampling) -> dict[str, Any]:
    """What the other half shows: false positives, their upper bound, recall; and both by the former thresholds."""
    unsafe = np.array([e.unsafe for e, _ in rows])
    scores = np.array([v.unsafe_probability for _, v in rows])
    prompts = [e.prompt.id for e, _ in rows]
    rates = lambda flagged: metrics.binary_metrics(unsafe, scores, flagged, prompts, resampling=resampling)  # noqa: E731
    new = rates(np.array([v.flagged for _, v in rows]))
    former = rates(np.array([tuning.margin(old, v) >= 0 for _, v in rows]))
    harmless = len({e.prompt.id for e, _ in rows if not e.unsafe})
    figures = ("fpr", "recall", "precision", "f1")
    return {
        "expect": {name: new["intervals"].get(name) for name in figures},
        "expect_fpr_bound": tuning.upper_bound(new["fpr"], harmless),
        "held_out": {"rows": len(rows), "harmless_prompts": harmless, "unsafe": int(unsafe.sum())},
        "before": {name: former["intervals"].get(name) for name in figures},
    }


def sentences(found: Mapping[Kind, Mapping[str, Any]], max_fpr: float) -> list[str]:
    """What was found, for people."""
    lines = []
    for kind, side in found.items():
        bound = f"{100 * side['bound']:.2g} %, by {side['prompts']} harmless prompts"
        if side["promised"]:
            lines.append(f"{kind}: false positives stay below {100 * max_fpr:g} % (upper bound {bound})")
        else:
            lines.append(
                f"{kind}: {100 * max_fpr:g} % CANNOT BE PROMISED: with {100 * side['false_positives']:.2g} % false "
                f"positives the upper bound is {bound}; at least {side['prompts_needed']} in this half, none flagged, "
                f"so about {2 * side['prompts_needed']} in all, are needed"
            )
        shown = {name: side["expect"][name] for name in ("fpr", "recall") if side["expect"][name]}
        expect = [f"{name} {_percent(i)} (before {_percent(side['before'][name])})" for name, i in shown.items()]
        lines.append(f"{kind}: to expect on new traffic like the other half: {', '.join(expect)}")
        own, few = side["categories"], side["categories_with_too_few"]
        if own or few:
            lines.append(
                f"{kind}: thresholds of their own: {', '.join(own) or 'none'}; {len(few)} categories have fewer than "
                f"the {side['prompts_needed']} harmless prompts of this half that it takes, and share thresholds"
            )
    return lines


def _percent(interval: Mapping[str, Any]) -> str:
    low, high = interval["low"], interval["high"]
    return f"{100 * interval['value']:.1f} %" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")
