"""Thresholds for a stated false-positive rate: chosen on one half of labelled data, measured on the other.

A policy is moved as a whole. A row's margin is the largest logit(P) - logit(threshold) over the rules that apply to it;
it is flagged where that reaches 0. Moving every threshold by one shift, in logits, keeps the rules' order and actions.

The shift is the smallest for which the upper bound of the false-positive rate, exact for a binomial (Clopper and
Pearson), stays within the target. Rows of one prompt are one piece of evidence: a rate f of N prompts counts as f N of
N, so the bound holds however alike they are. With no false positive among N the bound is 1 - (1 - confidence)^(1/N),
about 3 / N: too few harmless prompts can promise nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from guard.policy import KindPolicy, Rule, Signal
from guard.types import Verdict

CONFIDENCE = 0.95  # one-sided, of the bound that is promised
_EDGE = 1e-12  # probabilities are told apart down to here


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How far thresholds move, in logits. bound: what the false-positive rate stays below, by the half it was chosen
    on; promised: whether that is within the target. prompts: harmless ones."""

    shift: float
    false_positives: float
    bound: float
    promised: bool
    prompts: int


def upper_bound(rate: float, prompts: int, confidence: float = CONFIDENCE) -> float:
    """What the rate of all traffic stays below, where `rate` was found among so many independent prompts."""
    if prompts < 1 or rate >= 1:
        return 1.0
    return float(stats.beta.ppf(confidence, rate * prompts + 1, (1 - rate) * prompts))


def prompts_needed(max_fpr: float, confidence: float = CONFIDENCE) -> int:
    """Harmless prompts of a half, none of them flagged, from which `max_fpr` can be promised."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_fpr))


def logit(p: Any) -> Any:
    return special.logit(np.clip(p, _EDGE, 1 - _EDGE))


def signals(verdict: Verdict) -> dict[Signal, float]:
    """What the rules look at."""
    levels = verdict.severity_probabilities
    return {
        "unsafe": verdict.unsafe_probability,
        "minor": 1 - levels[0],
        "moderate": levels[2] + levels[3],
        "severe": levels[3],
    }


def margin(policy: KindPolicy, verdict: Verdict) -> float:
    """How far the verdict is above the nearest threshold, in logits; flagged from 0 on, infinite where not judged."""
    if verdict.degraded:
        return math.inf
    found = signals(verdict)
    rules = [item for _, own in policy.rule_sets(verdict.categories) for item in own.items()]
    return max(float(logit(found[name]) - logit(rule.threshold)) for name, rule in rules)


def choose(
    margins: Sequence[float], prompts: Sequence[Hashable], max_fpr: float, others: Sequence[float] = ()
) -> Shift:
    """The smallest shift within `max_fpr` by its upper bound; else, not promised, within it by the rate found.

    margins: of harmless rows; prompts: their ids. others: margins of unsafe rows, between which nothing changes.
    """
    ordered, n = np.sort(np.asarray(margins))[::-1], len(set(prompts))
    rates = np.arange(len(ordered)) / len(ordered)  # k false positives where thresholds stand above ordered[k]
    allowed = [k for k, rate in enumerate(rates) if upper_bound(rate, n) <= max_fpr]
    promised = bool(allowed) and math.isfinite(ordered[allowed[-1]])
    within = allowed if promised else [k for k, rate in enumerate(rates) if rate <= max_fpr]
    k = next((k for k in reversed(within) if math.isfinite(ordered[k])), int(np.isinf(ordered).sum()))
    level = float(ordered[k]) if k < len(ordered) else 0.0
    rate = float(np.mean(ordered > level))
    return Shift(
        shift=_above(level, [*ordered, *others]),
        false_positives=rate,
        bound=upper_bound(rate, n),
        promised=promised,
        prompts=n,
    )


def _above(level: float, margins: Sequence[float]) -> float:
    """Half way from `level` to the next margin, at most half a logit above."""
    higher = [m for m in margins if m > level]
    return level + min(0.5, (min(higher) - level) / 2 if higher else 0.5)


def moved(rules: Mapping[Signal, Rule], shift: float) -> dict[Signal, Rule]:
    """The rules with every threshold moved by so many logits."""
    at = lambda rule: float(np.clip(special.expit(logit(rule.threshold) + shift), _EDGE, 1.0))  # noqa: E731
    return {name: Rule(threshold=at(rule), action=rule.action) for name, rule in rules.items()}


def moved_policy(policy: KindPolicy, base: float, categories: Mapping[str, float]) -> KindPolicy:
    """The policy moved by `base`; that of a category of `categories` by its own shift."""
    own = {
        name: moved({**policy.rules, **policy.categories.get(name, {})}, categories.get(name, base))
        for name in {**policy.categories, **categories}
    }
    return KindPolicy(category_threshold=policy.category_threshold, rules=moved(policy.rules, base), categories=own)
