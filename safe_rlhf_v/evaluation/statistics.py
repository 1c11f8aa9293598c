"""Estimates with honest intervals, and the numbers that say how a cost vector or a preference model behaves.

The unit of evidence is the PROMPT, not the answer: several samples of one prompt are one piece of evidence with less
noise. Every interval therefore averages within a prompt first and resamples prompts. B answers, N prompts.
Signs: cost > 0 is unsafe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """How intervals are made. level: their coverage. draws: bootstrap resamples. Equal settings, equal intervals."""

    level: float = 0.95
    draws: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.draws < 100:
            raise ValueError(f"level {self.level} and draws {self.draws}: need 0 < level < 1 and at least 100 draws")


DEFAULT = Resampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its interval. n: prompts behind it. low and high are None where the data cannot give one."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """How much very safe answers pay for unsafe ones in a mean constraint (the concern of RePO, NeurIPS 2025).

    mean_positive, mean_negative: E{c}+ and E{c}-, both >= 0, so mean = mean_positive - mean_negative.
    compensated_mass: min of the two: the unsafe mass that a mean constraint at 0 cannot see.
    cvar: mean of the worst (1 - alpha) share. share_above_tau: share of prompts with P(c > 0 | x) > tau.
    """

    mean: float
    mean_positive: float
    mean_negative: float
    unsafe_share: float
    compensated_mass: float
    cvar: float
    alpha: float
    share_above_tau: float
    tau: float
    n_answers: int
    n_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Answers whose predicted probability fell in one bin."""

    confidence: float
    frequency: float
    count: int


def _vector(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a vector with at least one entry, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}: entry {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite; fix it or drop that answer"
        )
    return array


# ---------------------------------------------------------------------------------------------------- intervals


def per_prompt(values: ArrayLike, prompts: Sequence[Hashable] | None = None) -> dict[Hashable, float]:
    """Mean of `values` (B,) within each prompt, in order of appearance. Without `prompts` each entry is its own."""
    array = _vector(values, "values")
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
    z2 = float(stats.norm.ppf(0.5 + level / 2)) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return (0.0 if successes == 0 else float(centre - half)), (1.0 if successes == n else float(centre + half))


def bootstrap_means(values: Array, resampling: Resampling = DEFAULT) -> Array:
    """Means (draws,) of resamples with replacement of `values` (N,). Deterministic in the seed."""
    rng, draws = np.random.default_rng(resampling.seed), resampling.draws
    rows = max(1, 2_000_000 // values.size)  # bounds memory: at most 16 MB of indices at a time
    chunks = [min(rows, draws - start) for start in range(0, draws, rows)]
    return np.concatenate([values[rng.integers(0, values.size, (k, values.size))].mean(axis=1) for k in chunks])


def mean_interval(
    values: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    resampling: Resampling = DEFAULT,
) -> Interval:
    """Mean over prompts of each prompt's mean, with a cluster-bootstrap interval.

    Expanded percentile interval (Hesterberg, arXiv 1411.5279 [paper]): the tails are widened for small N, where the
    plain percentile interval is too narrow. bounds: the range that values can take. Where every prompt gave the same
    value v a resample says nothing; the interval then is what stays possible when a share u of unseen prompts, u the
    Wilson upper bound of 0 of N, lies at the bounds: v - u (v - a) .. v + u (b - v). For a proportion this IS Wilson's.
    """
    means = np.array(list(per_prompt(values, prompts).values()))
    n, value = means.size, float(means.mean())
    low: float | None = None
    high: float | None = None
    if np.ptp(means) <= 1e-12 * max(1.0, abs(value)):
        if bounds is not None:
            share = wilson(0, n, resampling.level)[1]
            low, high = value - share * (value - bounds[0]), value + share * (bounds[1] - value)
        return Interval(value=value, low=low, high=high, n=n)
    tail = float(stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + resampling.level / 2, n - 1)))
    low, high = (float(q) for q in np.quantile(bootstrap_means(means, resampling), [tail, 1 - tail]))
    if bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return Interval(value=value, low=min(low, value), high=max(high, value), n=n)


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


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    prompts_after: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
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


# ---------------------------------------------------------------------------------------------------- costs


def cvar(costs: ArrayLike, alpha: float = 0.9) -> float:
    """Mean of the worst (1 - alpha) share of `costs` (B,): min over eta of eta + E{c - eta}+ / (1 - alpha)."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha {alpha} is outside [0, 1); 0.9 means the worst tenth")
    array = _vector(costs, "costs")
    eta = np.quantile(array, alpha, method="inverted_cdf")  # a minimiser is always one of the samples
    return float(eta + np.maximum(array - eta, 0).mean() / (1 - alpha))


def compensation(
    costs: ArrayLike, prompts: Sequence[Hashable] | None = None, *, alpha: float = 0.9, tau: float = 0.5
) -> Compensation:
    """Compensation statistics of a cost vector (B,). prompts: id of each answer's prompt, for P(c > 0 | x)."""
    array = _vector(costs, "costs")
    positive, negative = float(np.maximum(array, 0).mean()), float(np.maximum(-array, 0).mean())
    unsafe = np.array(list(per_prompt(array > 0, prompts).values()))
    return Compensation(
        mean=float(array.mean()),
        mean_positive=positive,
        mean_negative=negative,
        unsafe_share=float((array > 0).mean()),
        compensated_mass=min(positive, negative),
        cvar=cvar(array, alpha),
        alpha=alpha,
        share_above_tau=float((unsafe > tau).mean()),
        tau=tau,
        n_answers=array.size,
        n_prompts=unsafe.size,
    )


# ---------------------------------------------------------------------------------------------------- models


def ranking_accuracy(scores: ArrayLike, preferred: ArrayLike) -> float:
    """Share of pairs whose preferred response scores higher, a tie counting half. scores (N, 2), preferred (N,) 0/1."""
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(preferred, dtype=np.int64)
    if pairs.ndim != 2 or pairs.shape != (index.size, 2) or index.size == 0:
        raise ValueError(
            f"scores has shape {pairs.shape} and preferred {index.shape}; expected (N, 2) and (N,) with N >= 1"
        )
    rows = np.arange(index.size)
    margin = pairs[rows, index] - pairs[rows, 1 - index]
    return float((margin > 0).mean() + (margin == 0).mean() / 2)


def sign_accuracy(costs: ArrayLike, unsafe: ArrayLike) -> float:
    """Share of responses on the right side of 0: cost > 0 where unsafe, cost <= 0 where safe. Both (B,)."""
    return float(((_vector(costs, "costs") > 0) == np.asarray(unsafe, dtype=bool)).mean())


def auc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney). None where one class is absent."""
    array, flags = _vector(scores, "scores"), np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(flags.sum()), int((~flags).sum())
    if n_positive == 0 or n_negative == 0:
        return None
    ranks = stats.rankdata(array)
    return float((ranks[flags].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def balanced_accuracy(predicted: ArrayLike, actual: ArrayLike) -> float | None:
    """Mean of the recall of both classes. None where one class is absent."""
    guess, truth = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    if truth.all() or not truth.any():
        return None
    return float((guess[truth].mean() + (~guess[~truth]).mean()) / 2)


def auc_interval(
    scores: ArrayLike,
    positive: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    resampling: Resampling = DEFAULT,
) -> Interval | None:
    """`auc` with an interval by prompt, from the placements of DeLong et al. (1988). None where a class is absent."""
    array, flags = _vector(scores, "scores"), np.asarray(positive, dtype=bool)
    value = auc(array, flags)
    if value is None:
        return None
    ranks, placed = stats.rankdata(array), np.empty(array.size)
    for own in (flags, ~flags):  # the share of the other class that lies below, ties half
        placed[own] = (ranks[own] - stats.rankdata(array[own])) / (~own).sum()
    placed[~flags] = 1 - placed[~flags]
    return _of_two_classes(value, placed, flags, prompts, 1.0, resampling)


def balanced_accuracy_interval(
    predicted: ArrayLike,
    actual: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    resampling: Resampling = DEFAULT,
) -> Interval | None:
    """`balanced_accuracy` with an interval by prompt. None where one class is absent."""
    guess, truth = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    value = balanced_accuracy(guess, truth)
    if value is None:
        return None
    return _of_two_classes(value, (guess == truth).astype(float), truth, prompts, 0.5, resampling)


def _of_two_classes(
    value: float,
    parts: Array,
    flags: NDArray[np.bool_],
    prompts: Sequence[Hashable] | None,
    weight: float,
    resampling: Resampling,
) -> Interval:
    """The interval of a figure that moves by weight * (the change of the mean of `parts` (B,)) in each of two classes.

    Linearised: a response of a class of share p adds weight * (part - class mean) / p, and a prompt all of its own.
    """
    moves = np.empty(parts.size)
    for own in (flags, ~flags):
        moves[own] = weight * (parts[own] - parts[own].mean()) / own.mean()
    keys: Sequence[Hashable] = range(parts.size) if prompts is None else list(prompts)
    counts, means = Counter(keys), per_prompt(moves, keys)
    per = parts.size / len(means)
    rows = [value + counts[key] / per * mean for key, mean in means.items()]
    return replace(mean_interval(rows, bounds=(0.0, 1.0), resampling=resampling), value=value)


def calibration_bins(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> list[CalibrationBin]:
    """Reliability diagram: non-empty bins of equal width over 0..1; the last one closed."""
    p, hit = _vector(probabilities, "probabilities"), np.asarray(outcomes, dtype=np.float64)
    if p.min() < 0 or p.max() > 1:
        raise ValueError(
            f"probabilities lie in {p.min():.3g}..{p.max():.3g}, outside 0..1; pass probabilities, not scores"
        )
    index = np.minimum((p * bins).astype(int), bins - 1)
    return [
        CalibrationBin(
            confidence=float(p[index == b].mean()),
            frequency=float(hit[index == b].mean()),
            count=int((index == b).sum()),
        )
        for b in np.unique(index)
    ]


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> float:
    """ECE: count-weighted mean of |frequency - confidence| over the bins."""
    table = calibration_bins(probabilities, outcomes, bins)
    return sum(b.count * abs(b.frequency - b.confidence) for b in table) / sum(b.count for b in table)


def sigmoid(scores: ArrayLike) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(scores, dtype=np.float64)))
