"""Means over seeds AND prompts, with intervals and tests that respect both.

Several training seeds answer the same prompts: a table y (S, P) of S seeds and P prompts, in which the answers of one
seed move together (that training run was lucky) and the answers to one prompt do (that prompt is hard): crossed random
effects, y_sp = m + a_s + b_p + e_sp. By the analysis of variance the mean's variance has two parts,

    v_S = var(seed means) / S             estimates  var(a)/S + var(e)/(S P), with S - 1 degrees of freedom
    v_P = (MS_P - min(MS_S, MS_e))/(S P)  estimates  var(b)/P, from below 0 taken as 0, with P - 1

and the level-q interval is m +- sqrt(t^2_{S-1} v_S + t^2_{P-1} v_P), each t the quantile of its own degrees of freedom
[Banerjee, Sankhya 22 (1960) 357-358, for two variances of unknown ratio]. It never errs more often than it says,
whatever the ratio: with w the share of v_S, the chance to cover is E F(w t^2_{S-1} u_S + (1-w) t^2_{P-1} u_P) for the
chi-square F of one degree, which is concave, so at least w q + (1-w) q. Satterthwaite's single t is not so: where three
seeds happen to agree it takes the prompts' degrees of freedom, and a test at .05/13 errs up to six times too often
(benchmarks/false_verdicts.py). p inverts the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from safe_rlhf_v.statistics import unseen

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
    value, parts = float(y.mean()), variances(y)
    low: float | None = None
    high: float | None = None
    p: float | None = None
    if float(sum(parts)) > 1e-20 * max(1.0, value**2):
        half = float(half_width(parts, y.shape, 1 - level))
        low, high, p = value - half, value + half, _p_value(abs(value), parts, (seeds, prompts))
        if bounds is not None:
            low, high = max(bounds[0], low), min(bounds[1], high)
    elif bounds is not None:
        low, high = unseen(value, prompts, bounds, level)
    return Estimate(value=value, low=low, high=high, p=p, seeds=seeds, prompts=prompts)


def variances(y: Array) -> tuple[Array, Array]:
    """v_S and v_P of tables y (..., S, P), each (...). A side of length 1 has none. Their sum is 0 where all agree."""
    seeds, prompts = y.shape[-2:]
    by_seed, by_prompt = y.mean(-1), y.mean(-2)
    none, cells = np.zeros(y.shape[:-2]), (seeds - 1) * (prompts - 1)
    of_seeds = by_seed.var(-1, ddof=1) / seeds if seeds > 1 else none
    of_prompts = by_prompt.var(-1, ddof=1) / prompts if prompts > 1 else none
    if not cells:
        return of_seeds, of_prompts
    residuals = y - by_seed[..., None] - by_prompt[..., None, :] + y.mean((-2, -1), keepdims=True)
    rest = (residuals**2).sum((-2, -1)) / cells / (seeds * prompts)
    # min: seeds that agree by luck take nothing off the prompts' part, so the sum is never below either mean square
    of_prompts = np.maximum(of_prompts - np.minimum(of_seeds, rest), 0.0)
    return of_seeds, np.where(of_seeds + of_prompts > 0, of_prompts, rest)


def half_width(parts: tuple[Array, Array], shape: tuple[int, ...], alpha: float) -> Array:
    """Half the interval of level 1 - alpha, for the `variances` (...) of tables of this shape (S, P)."""
    terms = zip(parts, shape, strict=True)
    return np.sqrt(sum(stats.t.isf(alpha / 2, n - 1) ** 2 * v for v, n in terms if n > 1))  # type: ignore[no-any-return]


LEAST_P = 1e-100


def _p_value(distance: float, parts: tuple[Array, Array], shape: tuple[int, int]) -> float:
    """The largest alpha whose interval does not reach `distance` from the mean."""

    def beyond(log_alpha: float) -> float:
        return float(half_width(parts, shape, np.exp(log_alpha))) - distance

    least = float(np.log(LEAST_P))
    if distance == 0:
        return 1.0
    return LEAST_P if beyond(least) <= 0 else float(np.exp(optimize.brentq(beyond, least, 0.0, xtol=1e-10)))


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
