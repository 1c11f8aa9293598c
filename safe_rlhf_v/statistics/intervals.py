"""Values with their intervals. Which recipe a figure takes: the table of `safe_rlhf_v.statistics`.

The unit of evidence is the PROMPT, not the answer: several samples of one prompt are one piece of evidence with less
noise. Every interval therefore averages within a prompt first and resamples prompts. B answers, N prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from safe_rlhf_v.statistics.bootstrap import DEFAULT, Array, Resampling, bootstrap_means

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its interval. n: prompts behind it. low and high are None where the data cannot give one."""

    value: float
    low: float | None
    high: float | None
    n: int


def vector(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a vector with at least one entry, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}: entry {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite; fix it or drop that answer"
        )
    return array


def per_prompt(values: ArrayLike, prompts: Sequence[Hashable] | None = None) -> dict[Hashable, float]:
    """Mean of `values` (B,) within each prompt, in order of appearance. Without `prompts` each entry is its own."""
    array = vector(values, "values")
    keys: Sequence[Hashable] = range(array.size) if prompts is None else prompts
    if len(keys) != array.size:
        raise ValueError(f"values has {array.size} entries but prompts has {len(keys)}; give one prompt id per answer")
    groups: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, array, strict=True):
        groups.setdefault(key, []).append(float(value))
    return {key: float(np.mean(group)) for key, group in groups.items()}


def wilson(successes: float, n: int, level: float = DEFAULT.level) -> tuple[float, float]:
    """Wilson score interval of a proportion; never empty, never outside 0..1, also at 0 or n successes."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes {successes} of n {n}: need n >= 1 and 0 <= successes <= n")
    z2 = float(special.ndtri(0.5 + level / 2)) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if successes == 0 else float(centre - half)), (1.0 if successes == n else float(centre + half))


def unseen(value: float, n: int, bounds: Bounds, level: float) -> tuple[float, float]:
    """What stays possible where n prompts all gave the same `value`, of which a resample says nothing.

    A share u of unseen prompts, u the Wilson upper bound of 0 of n, may lie at the bounds (a, b): v - u (v - a) ..
    v + u (b - v). For a proportion this IS Wilson's interval.
    """
    share = wilson(0, n, level)[1]
    return value - share * (value - bounds[0]), value + share * (bounds[1] - value)


def bootstrap_interval(
    value: float, drawn: Array, n: int, *, bounds: Bounds | None = None, resampling: Resampling = DEFAULT
) -> Interval:
    """Expanded percentile interval (Hesterberg, arXiv 1411.5279 [paper]) of a figure from its resamples `drawn` (D,).

    The tails are widened for small n, where the plain percentile interval is too narrow. n: prompts behind the figure.
    bounds: the range it can take; with it, resamples that all agree give `unseen`, without it no interval.
    """
    if n < 2 or not drawn.size or np.ptp(drawn) <= 1e-12 * max(1.0, abs(value)):
        low, high = (None, None) if bounds is None else unseen(value, n, bounds, resampling.level)
        return Interval(value=value, low=low, high=high, n=n)
    tail = float(special.ndtr(-np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 0.5 + resampling.level / 2)))
    low, high = (float(q) for q in np.quantile(drawn, [tail, 1 - tail]))
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return Interval(value=value, low=min(low, value), high=max(high, value), n=n)


def mean_interval(
    values: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    bounds: Bounds | None = None,
    resampling: Resampling = DEFAULT,
) -> Interval:
    """Mean over prompts of each prompt's mean, with a bootstrap interval. bounds: the range that values can take."""
    means = np.array(list(per_prompt(values, prompts).values()))
    same = np.ptp(means) <= 1e-12 * max(1.0, abs(float(means.mean())))
    drawn = means[:1] if same else bootstrap_means(means, resampling)
    return bootstrap_interval(float(means.mean()), drawn, means.size, bounds=bounds, resampling=resampling)


def proportion_interval(
    flags: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    resampling: Resampling = DEFAULT,
) -> Interval:
    """Share of true `flags` (B,), by prompt: Wilson with one answer per prompt, else the cluster bootstrap."""
    shares = np.array(list(per_prompt(flags, prompts).values()))
    if np.isin(shares, (0.0, 1.0)).all():
        low, high = wilson(float(shares.sum()), shares.size, resampling.level)
        return Interval(value=float(shares.mean()), low=low, high=high, n=shares.size)
    return mean_interval(flags, prompts, bounds=(0.0, 1.0), resampling=resampling)


def linearised(value: float, moves: Array, prompts: Sequence[Hashable]) -> list[float]:
    """One number a prompt, whose mean is `value` and varies between prompts as a figure of the rows does.

    moves: (B,) by how much each row moves the figure, of mean 0. A prompt moves it by the sum of its rows, over the
    rows that a prompt has in the mean.
    """
    counts, means = Counter(prompts), per_prompt(moves, prompts)
    per = len(prompts) / len(means)
    return [value + counts[key] / per * mean for key, mean in means.items()]


def share_of_rows(
    flags: ArrayLike, prompts: Sequence[Hashable] | None = None, *, resampling: Resampling = DEFAULT
) -> Interval:
    """Share of true `flags` (B,) among ROWS, halves allowed, with an interval by prompt.

    A prompt weighs by its rows: precision and recall are such, for a prompt has as many flagged answers as it has.
    Where all prompts have equally many rows it is `proportion_interval`, else of the ratio of sums, linearised.
    """
    array = vector(flags, "flags")
    if prompts is None or len(set(Counter(prompts).values())) == 1:
        return proportion_interval(array, prompts, resampling=resampling)
    value = float(array.mean())
    return mean_interval(linearised(value, array - value, prompts), bounds=(0.0, 1.0), resampling=resampling)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    prompts_after: Sequence[Hashable] | None = None,
    *,
    bounds: Bounds | None = None,
    resampling: Resampling = DEFAULT,
) -> Interval:
    """Mean over prompts of (after - before), resampling prompts, so that what prompts share cancels.

    prompts_after: ids of the `after` answers, where their order or number differs. Both sides need the same prompts.
    bounds: the range of one value; the difference then lies in -(b - a)..(b - a).
    """
    first = per_prompt(before, prompts)
    second = per_prompt(after, prompts if prompts_after is None else prompts_after)
    if first.keys() != second.keys():
        missing = first.keys() ^ second.keys()
        raise ValueError(
            f"{len(missing)} prompts were answered on one side only, e.g. {next(iter(missing))!r}; use the same prompts"
        )
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return mean_interval([second[key] - first[key] for key in first], bounds=span, resampling=resampling)
