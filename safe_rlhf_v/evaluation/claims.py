"""What papers claim, as data, and the verdict on each from the numbers of a comparison, by one stated rule.

A claim is turned into g (S, P), a table over seeds and prompts that is above 0 where the claim is right. Then:
    holds            the mean of g is above 0, and Holm's adjusted p over all claims is at most 0.05
    does not hold    it is below 0 at the same significance; or the whole 95 % interval lies within +-`worth`, the
                     smallest difference that would matter
    not decided      otherwise, or where the runs that it needs are missing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from safe_rlhf_v.evaluation.comparison import FIGURES, REFERENCE, Array, Comparison, gaps
from safe_rlhf_v.evaluation.crossed import Estimate, at_equal_cost, crossed, holm

Verdict = Literal["holds", "does not hold", "not decided"]
ALPHA = 0.05
SEEDS = 3


class Claim(BaseModel):
    """One claim. kind says what is compared:

    difference       `figure` of `method` minus that of `against` ("base": the model they start from)
    equal_cost       the same where `against` has the mean cost of `method`: between two of its runs at other bounds
    smallest_bound   achieved minus requested fall of the mean cost, at the smallest bound that was run
    largest_bound    the same at the largest for which the method found a solution
    bound_error      mean distance of achieved from requested over the sweep, `method` minus `against`
    gap              size of the primal-dual gap of the last iteration minus that of the first; an iterate that misses
                     its bound has a gap below 0, and that is no better

    margin: how much in the wrong direction still counts as right ("no less helpful, within 0.1").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: str
    text: str
    kind: Literal["difference", "equal_cost", "smallest_bound", "largest_bound", "bound_error", "gap"] = "difference"
    method: str
    against: str = REFERENCE
    figure: str = "unsafe_rate"
    expect: Literal["lower", "higher"]
    margin: float = Field(0.0, ge=0)
    worth: float = Field(0.0, ge=0)

    @field_validator("figure")
    @classmethod
    def _known(cls, figure: str) -> str:
        if figure not in FIGURES:
            raise ValueError(f"unknown figure; one of {', '.join(FIGURES)}")
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A claim's numbers. left, right: what is compared, None where there is one side. difference: left minus right,
    or left alone. why: what is missing, or what the reader has to know."""

    claim: Claim
    verdict: Verdict
    left: float | None = None
    right: float | None = None
    difference: Estimate | None = None
    p_adjusted: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Sides:
    """The two compared tables, or one. only: the verdicts that could be concluded; None: every one."""

    difference: Array
    left: float
    right: float | None
    only: tuple[Verdict, ...] | None = None
    why: str = ""


def judge_claims(claims: Sequence[Claim], comparison: Comparison) -> list[Finding]:
    """A finding for each claim, in order."""
    sides = [_sides(claim, comparison) for claim in claims]
    tests = {
        i: crossed(_sign(claim) * s.difference + claim.margin)
        for i, (claim, s) in enumerate(zip(claims, sides, strict=True))
        if isinstance(s, _Sides)
    }
    tested = [i for i, test in tests.items() if test.p is not None]
    adjusted = dict(zip(tested, holm([float(tests[i].p or 0) for i in tested]), strict=True))
    findings = []
    for i, (claim, side) in enumerate(zip(claims, sides, strict=True)):
        if isinstance(side, str):
            findings.append(Finding(claim=claim, verdict="not decided", why=side))
            continue
        verdict, why = _verdict(claim, tests[i], adjusted.get(i), side)
        findings.append(
            Finding(
                claim=claim,
                verdict=verdict,
                left=side.left,
                right=side.right,
                difference=crossed(side.difference),
                p_adjusted=adjusted.get(i),
                why=why,
            )
        )
    return findings


def _sign(claim: Claim) -> float:
    return -1.0 if claim.expect == "lower" else 1.0


def _verdict(claim: Claim, test: Estimate, p: float | None, side: _Sides) -> tuple[Verdict, str]:
    if test.seeds < SEEDS:
        return "not decided", f"{test.seeds} seed{'s' * (test.seeds > 1)} of the {SEEDS} that a claim takes at least"
    if p is None or test.low is None or test.high is None:
        return "not decided", side.why or "all runs agree on every prompt"
    found: Verdict = "not decided"
    why = side.why
    low, high = test.low - claim.margin, test.high - claim.margin
    if p <= ALPHA:
        found = "holds" if test.value > 0 else "does not hold"
    elif claim.worth and -claim.worth < low and high < claim.worth and side.only is None:
        found, why = "does not hold", f"the difference is smaller than {claim.worth:g}"
    return (found, why) if side.only is None or found in side.only else ("not decided", side.why)


def _sides(claim: Claim, comparison: Comparison) -> _Sides | str:
    """What the claim compares, or what is missing for it."""
    if not comparison.of(claim.method) and not comparison.bounds(claim.method):
        return f"no finished run of {claim.method}"
    return {
        "difference": _difference,
        "equal_cost": _equal_cost,
        "smallest_bound": _at_bound,
        "largest_bound": _at_bound,
        "bound_error": _bound_error,
        "gap": _gap,
    }[claim.kind](claim, comparison)


def _difference(claim: Claim, comparison: Comparison) -> _Sides | str:
    table = comparison.difference(claim.method, claim.against, claim.figure)
    if table is None:
        return f"no seed with both {claim.method} and {claim.against}"
    left = np.mean(list(comparison.table(claim.method, claim.figure).values()))
    return _Sides(table, float(left), float(left - table.mean()))


def _equal_cost(claim: Claim, comparison: Comparison) -> _Sides | str:
    """Beyond the range of `against`'s runs a verdict needs the odds against it: fewer unsafe at a HIGHER mean cost."""
    keep, rows, lefts, outside = comparison.chosen(claim.figure), [], [], []
    value = FIGURES[claim.figure].value
    for run in comparison.of(claim.method):
        same = [
            r for r in comparison.runs
            if r.info.method == claim.against and r.info.seed == run.info.seed and r.info.found
        ]  # fmt: skip
        if not same:
            continue
        costs = [float(r.columns["cost"].mean()) for r in same]
        other, out = at_equal_cost(costs, [value(r)[keep] for r in same], float(run.columns["cost"].mean()))
        rows.append(value(run)[keep] - other)
        lefts.append(value(run)[keep].mean())
        outside.append(out)
    if not rows:
        return f"no seed with both {claim.method} and {claim.against}"
    table, left, out = np.stack(rows), float(np.mean(lefts)), float(np.mean(outside))
    right = left - float(table.mean())
    if not any(outside):
        return _Sides(table, left, right)
    if min(outside) < 0 < max(outside):
        why = f"{claim.method} is costlier than every run of {claim.against} with one seed and cheaper with another"
        return _Sides(table, left, right, (), f"{why}: no equal cost")
    how = "costlier" if out > 0 else "cheaper"
    why = f"{claim.method} is {abs(out):.2f} {how} in the mean than every run of {claim.against}: no equal cost"
    only: Verdict = "holds" if (out > 0) == (claim.expect == "lower") else "does not hold"
    return _Sides(table, left, right, (only,), why)


def _at_bound(claim: Claim, comparison: Comparison) -> _Sides | str:
    bounds = [b for b in comparison.bounds(claim.method) if comparison.improvement(claim.method, b)]
    if len(bounds) < 2:
        return f"{claim.method} has runs at {len(bounds)} bound{'s' * (len(bounds) != 1)}; it takes two or more"
    bound = bounds[0] if claim.kind == "smallest_bound" else bounds[-1]
    found = comparison.improvement(claim.method, bound)
    achieved = np.stack(list(found.values()))
    return _Sides(achieved - bound, float(achieved.mean()), bound)


def _bound_error(claim: Claim, comparison: Comparison) -> _Sides | str:
    """|achieved - requested| by its sign in the mean over seeds and prompts, so that it stays a mean (delta method)."""
    methods = (claim.method, claim.against)
    found = [{b: t for b in comparison.bounds(m) if (t := comparison.improvement(m, b))} for m in methods]
    bounds = sorted(found[0].keys() & found[1].keys())
    if not bounds:
        return f"no bound at which both {claim.method} and {claim.against} were run"
    seeds = sorted(set.intersection(*(set(side[b]) for side in found for b in bounds)))
    if not seeds:
        return f"no seed with both {claim.method} and {claim.against} at every bound of the sweep"
    errors = [[np.stack([side[b][s] for s in seeds]) - b for b in bounds] for side in found]
    left, right = (np.mean([np.sign(e.mean()) * e for e in side], axis=0) for side in errors)
    return _Sides(left - right, float(left.mean()), float(right.mean()))


def _gap(claim: Claim, comparison: Comparison) -> _Sides | str:
    logged = [g for run in comparison.of(claim.method) if len(g := gaps(run)) > 1]
    if not logged:
        return f"{claim.method} logged no primal-dual gap over two or more iterations"
    first, last = (np.array([[abs(g[i][1])] for g in logged]) for i in (0, -1))
    return _Sides(last - first, float(last.mean()), float(first.mean()))
