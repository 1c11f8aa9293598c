"""Means over seeds AND prompts, with intervals and tests that respect both.

Several training seeds answer the same prompts: a table y (S, P) of S seeds and P prompts, in which the answers of one
seed move together (that training run was lucky) and the answers to one prompt do (that prompt is hard). The mean's
variance is that of a crossed random-effects table, estimated without bias by its analysis of variance [ours; the
two-way clustering of Cameron, Gelbach and Miller, doi:10.1198/jbes.2010.07136, written for a full table]:

    y_sp = m + a_s + b_p + e_sp       Var(mean) = var(seed means)/S + var(prompt means)/P - var(residuals)/(S P)

never less than either of the first two terms. Intervals and p-values are Student's, with Satterthwaite's degrees of
freedom, so that three seeds that differ count as three pieces of evidence, however many prompts they answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safe_rlhf_v.evaluation.statistics import wilson

Array = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds and prompts. p: two-sided, of the mean being 0. low, high and p are None where every entry is
    the same and nothing says what else was possible. With one seed the interval speaks of prompts alone."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    prompts: int


def crossed(y: Array, *, bounds: tuple[float, float] | None = None, level: float = LEVEL) -> Estimate:
    """The mean of y (S, P) with its interval and p-value. bounds: the range one entry can take.

    Where all entries agree and bounds are given, the interval is Wilson's for 0 of P prompts: what stays possible.
    """
    seeds, prompts = y.shape
    value, variance, df = float(y.mean()), *_variance(y)
    low: float | None = None
    high: float | None = None
    p: float | None = None
    if variance > 1e-20 * max(1.0, value**2):
        half = float(stats.t.ppf(0.5 + level / 2, df)) * variance**0.5
        low, high, p = value - half, value + half, float(2 * stats.t.sf(abs(value) / variance**0.5, df))
        if bounds is not None:
            low, high = max(bounds[0], low), min(bounds[1], high)
    elif bounds is not None:
        share = wilson(0, prompts, level)[1]
        low, high = value - share * (value - bounds[0]), value + share * (bounds[1] - value)
    return Estimate(value=value, low=low, high=high, p=p, seeds=seeds, prompts=prompts)


def _variance(y: Array) -> tuple[float, float]:
    """Variance of the mean of y (S, P), and its degrees of freedom. A side of length 1 has no variance."""
    seeds, prompts = y.shape
    by_seed, by_prompt = y.mean(1), y.mean(0)
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    of_prompts = by_prompt.var(ddof=1) / prompts if prompts > 1 else 0.0
    rest, cells = 0.0, (seeds - 1) * (prompts - 1)
    if cells:
        residuals = y - by_seed[:, None] - by_prompt[None] + y.mean()
        rest = float((residuals**2).sum()) / cells / (seeds * prompts)
    variance = float(max(of_seeds + of_prompts - rest, of_seeds, of_prompts))
    terms = ((of_seeds, seeds - 1), (of_prompts, prompts - 1), (rest, cells))
    spread = sum(v**2 / n for v, n in terms if n)
    largest = max((n for v, n in terms[:2] if v), default=1)
    return variance, float(min(variance**2 / spread, largest)) if spread else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (n,): with them, the chance of even one wrong rejection stays at the level.

    Scand. J. Statist. 6 (1979) 65-70: the k-th smallest is multiplied by n - k + 1, and none is below the one before.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def at_equal_cost(costs: Sequence[float], tables: Sequence[Array], wanted: float) -> tuple[Array, float]:
    """A method's per-prompt figures (P,) where its mean cost is `wanted`, between two of its runs at other bounds.

    costs (K,) and tables, K vectors (P,): mean cost and figures of the runs of one seed. Linear in the mean cost, so
    it is what a mixture of the two neighbouring policies would give, prompt by prompt. Outside the range of the runs
    it is the nearest run; the second value is how far `wanted` lies outside (above 0: beyond the costliest).
    """
    order = np.argsort(costs, kind="stable")
    c = np.asarray(costs, dtype=np.float64)[order]
    t = [tables[i] for i in order]
    if wanted <= c[0]:
        return t[0], float(wanted - c[0])
    if wanted >= c[-1]:
        return t[-1], float(wanted - c[-1])
    above = int(np.searchsorted(c, wanted, side="right"))
    share = (wanted - c[above - 1]) / (c[above] - c[above - 1])
    return (1 - share) * t[above - 1] + share * t[above], 0.0
