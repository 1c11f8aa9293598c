"""What papers claim, as data, and the verdict on each from the numbers of a comparison, by one stated rule.

A claim is turned into g (S, P), a table over seeds and prompts that is above 0 where the claim is right. Then:
    holds            the mean of g is above 0, and Holm's adjusted p is at most 0.05
    does not hold    it is below 0 at the same significance; or the difference is smaller than `worth`, the smallest
                     that would matter: neither -worth nor +worth is within what the adjusted p leaves possible
    not decided      otherwise, or where the runs that it needs are missing
Holm's family is every test of the page: one a claim, and one more for each with `worth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from safe_rlhf_v.comparison.comparison import FIGURES, Comparison
from safe_rlhf_v.comparison.crossed import Estimate, crossed, holm
from safe_rlhf_v.comparison.mixture import between
from safe_rlhf_v.comparison.runs import REFERENCE, Array, slacks

Verdict = Literal["holds", "does not hold", "not decided"]
ALPHA = 0.05
SEEDS = 3


class Claim(BaseModel):
    """One claim. kind says what is compared:

    difference       `figure` of `method` minus that of `against` ("base": the model they start from)
    equal_cost       the same where `against` has the mean cost of `method`: of the mixture of its two runs around it
    equal_reward     the same where `against` has the mean reward of `method`
    smallest_bound   achieved minus requested fall of the mean cost, at the smallest bound that was run
    largest_bound    the same at the largest for which the method found a solution
    bound_error      mean distance of achieved from requested over the sweep, `method` minus `against`
    slope            distance of the slope of achieved on requested fall from 1 over the sweep, `method` minus `against`
    slack            size of u, achieved minus requested improvement, of the last iteration minus that of the first

    margin: how much in the wrong direction still counts as right ("no less helpful, within 0.1").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: str
    text: str
    kind: Literal[
        "difference",
        "equal_cost",
        "equal_reward",
        "smallest_bound",
        "largest_bound",
        "bound_error",
        "slope",
        "slack",
    ] = "difference"
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
    small = {i: p for i in tests if (p := _p_small(claims[i], sides[i])) is not None}
    tested = [i for i, test in tests.items() if test.p is not None]
    found = holm([*(float(tests[i].p or 0) for i in tested), *small.values()])
    adjusted = dict(zip(tested, found, strict=False))
    small = dict(zip(small, found[len(tested) :], strict=True))
    findings = []
    for i, (claim, side) in enumerate(zip(claims, sides, strict=True)):
        if isinstance(side, str):
            findings.append(Finding(claim=claim, verdict="not decided", why=side))
            continue
        verdict, why = _verdict(claim, tests[i], adjusted.get(i), small.get(i, 1.0), side)
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


def _p_small(claim: Claim, side: _Sides | str) -> float | None:
    """Of the difference being `worth` or more, one way or the other; None where nothing of the kind is asked."""
    if isinstance(side, str) or not claim.worth or side.only is not None:
        return None
    ends = [crossed(side.difference - w) for w in (-claim.worth, claim.worth)]
    if not ends[1].value < 0 < ends[0].value:
        return 1.0
    return max((e.p for e in ends if e.p is not None), default=None)


def _verdict(claim: Claim, test: Estimate, p: float | None, small: float, side: _Sides) -> tuple[Verdict, str]:
    if test.seeds < SEEDS:
        return "not decided", f"{test.seeds} seed{'s' * (test.seeds > 1)} of the {SEEDS} that a claim takes at least"
    if p is None:
        return "not decided", side.why or "all runs agree on every prompt"
    found: Verdict = "not decided"
    why = side.why
    if p <= ALPHA:
        found = "holds" if test.value > 0 else "does not hold"
    elif small <= ALPHA:
        found, why = "does not hold", f"the difference is smaller than {claim.worth:g}"
    return (found, why) if side.only is None or found in side.only else ("not decided", side.why)


def _sides(claim: Claim, comparison: Comparison) -> _Sides | str:
    """What the claim compares, or what is missing for it."""
    if not comparison.of(claim.method) and not comparison.bounds(claim.method):
        return f"no finished run of {claim.method}"
    return {
        "difference": _difference,
        "equal_cost": _at_equal,
        "equal_reward": _at_equal,
        "smallest_bound": _at_bound,
        "largest_bound": _at_bound,
        "bound_error": _bound_error,
        "slope": _slope,
        "slack": _slack,
    }[claim.kind](claim, comparison)


def _difference(claim: Claim, comparison: Comparison) -> _Sides | str:
    table = comparison.difference(claim.method, claim.against, claim.figure)
    if table is None:
        return f"no seed with both {claim.method} and {claim.against}"
    left = np.mean(list(comparison.table(claim.method, claim.figure).values()))
    return _Sides(table, float(left), float(left - table.mean()))


EQUAL = {"equal_cost": ("mean_cost", "cost"), "equal_reward": ("mean_reward", "reward")}


def _at_equal(claim: Claim, comparison: Comparison) -> _Sides | str:
    """Beyond the range of `against`'s runs a verdict needs the odds against it: fewer unsafe at a HIGHER mean cost, or
    at a higher mean reward."""
    figure, keep = FIGURES[claim.figure], comparison.chosen(claim.figure)
    level = FIGURES[EQUAL[claim.kind][0]].value
    rows, lefts, outside = [], [], []
    for run in comparison.of(claim.method):
        same = [
            r for r in comparison.runs
            if r.info.method == claim.against and r.info.seed == run.info.seed and r.info.found
        ]  # fmt: skip
        if not same:
            continue
        levels, wanted = [float(level(r).mean()) for r in same], float(level(run).mean())
        if not np.isfinite([*levels, wanted]).all():
            return f"not every answer has a {EQUAL[claim.kind][1]}"
        first, second, share, out = between(levels, wanted)
        rows.append((figure.value(run) - figure.mixed(same[first], same[second], share))[keep])
        lefts.append(figure.value(run)[keep].mean())
        outside.append(out)
    if not rows:
        return f"no seed with both {claim.method} and {claim.against}"
    table, left = np.stack(rows), float(np.mean(lefts))
    if not np.isfinite(table).all():
        return f"not every answer was judged: {figure.label}"
    return _Sides(table, left, left - float(table.mean()), *_beyond(claim, outside))


def _beyond(claim: Claim, outside: Sequence[float]) -> tuple[tuple[Verdict, ...] | None, str]:
    """What can be concluded and what the reader has to know, where seeds stand outside the other method's runs."""
    what, out = EQUAL[claim.kind][1], float(np.mean(outside))
    if not any(outside):
        return None, ""
    more, less = ("costlier", "cheaper") if what == "cost" else ("higher in reward", "lower in reward")
    if min(outside) < 0 < max(outside):
        why = f"{claim.method} is {more} than every run of {claim.against} with one seed and {less} with another"
        return (), f"{why}: no equal {what}"
    how = more if out > 0 else less
    why = f"{claim.method} is {abs(out):.2f} {how} in the mean than every run of {claim.against}: no equal {what}"
    return ("holds" if (out > 0) == (claim.expect == "lower") else "does not hold",), why


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


def _slope(claim: Claim, comparison: Comparison) -> _Sides | str:
    """|slope - 1| by its sign in the mean, so that it stays a mean. The least-squares slope over bounds is linear in
    what was achieved, prompt by prompt: sum (b - mean b) achieved / sum (b - mean b)^2."""
    methods = (claim.method, claim.against)
    found = [{b: t for b in comparison.bounds(m) if (t := comparison.improvement(m, b))} for m in methods]
    bounds = sorted(found[0].keys() & found[1].keys())
    if len(bounds) < 2:
        return f"{claim.method} and {claim.against} have {len(bounds)} bounds in common; a slope takes two or more"
    seeds = sorted(set.intersection(*(set(side[b]) for side in found for b in bounds)))
    if not seeds:
        return f"no seed with both {claim.method} and {claim.against} at every bound of the sweep"
    centred = np.array(bounds) - np.mean(bounds)
    weights = centred / (centred**2).sum()
    slopes = [sum(w * np.stack([side[b][s] for s in seeds]) for w, b in zip(weights, bounds)) for side in found]
    left, right = (np.sign(slope.mean() - 1) * (slope - 1) for slope in slopes)
    return _Sides(left - right, float(left.mean()), float(right.mean()))


def _slack(claim: Claim, comparison: Comparison) -> _Sides | str:
    logged = [u for run in comparison.of(claim.method) if len(u := slacks(run)) > 1]
    if not logged:
        return f"{claim.method} logged no distance from its bounds over two or more iterations"
    first, last = (np.array([[u[i][1]] for u in logged]) for i in (0, -1))
    return _Sides(last - first, float(last.mean()), float(first.mean()))
