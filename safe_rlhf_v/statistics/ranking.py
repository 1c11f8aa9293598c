"""How well scores order pairs and tell two classes apart, with intervals by prompt. N pairs, B responses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safe_rlhf_v.statistics.bootstrap import DEFAULT, Array, Resampling
from safe_rlhf_v.statistics.intervals import Interval, linearised, mean_interval, vector


@dataclass(frozen=True, slots=True)
class Ranked:
    """N pairs: the preferred response's score minus the other's, (N,), and whether the label says something, (N,) bool.

    A label that was forced on a tie says nothing: such pairs are counted apart. Shares of no pairs are None, not 0.
    """

    margin: Array
    told: NDArray[np.bool_]

    @property
    def wins(self) -> Array:
        """(N,) 1 where the preferred response scores higher, 1/2 where both score the same."""
        return (self.margin > 0) + (self.margin == 0) / 2

    @property
    def accuracy(self) -> float | None:
        return mean_or_none(self.wins[self.told])

    @property
    def accuracy_tied(self) -> float | None:
        return mean_or_none(self.wins[~self.told])

    @property
    def pairs(self) -> int:
        return int(self.told.sum())

    @property
    def pairs_tied(self) -> int:
        return int((~self.told).sum())


def mean_or_none(values: ArrayLike) -> float | None:
    """The mean of a vector; None of nothing."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def ranked(scores: ArrayLike, higher: ArrayLike, tied: ArrayLike | None = None) -> Ranked:
    """scores: (N, 2) in data-set order; higher: (N,) 0 or 1, which should score higher; tied: (N,) bool, forced."""
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(higher, dtype=np.int64)
    if pairs.ndim != 2 or pairs.shape != (index.size, 2) or index.size == 0:
        raise ValueError(
            f"scores has shape {pairs.shape} and preferred {index.shape}; expected (N, 2) and (N,) with N >= 1"
        )
    rows = np.arange(index.size)
    told = np.ones(index.size, dtype=bool) if tied is None else ~np.asarray(tied, dtype=bool)
    return Ranked(pairs[rows, index] - pairs[rows, 1 - index], told)


def sign_accuracy(costs: ArrayLike, unsafe: ArrayLike) -> float:
    """Share of responses on the right side of 0: cost > 0 where unsafe, cost <= 0 where safe. Both (B,)."""
    return float(((vector(costs, "costs") > 0) == np.asarray(unsafe, dtype=bool)).mean())


def auc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney). None where one class is absent."""
    array, flags = vector(scores, "scores"), np.asarray(positive, dtype=bool)
    if flags.all() or not flags.any():
        return None
    return float(_below(array[flags], array[~flags]).sum() / (flags.sum() * (~flags).sum()))


def _below(values: Array, others: Array) -> Array:
    """How many of `others` (M,) lie below each value (n,), ties half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


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
    array, flags = vector(scores, "scores"), np.asarray(positive, dtype=bool)
    value = auc(array, flags)
    if value is None:
        return None
    placed = np.empty(array.size)
    for own in (flags, ~flags):
        placed[own] = _below(array[own], array[~own]) / (~own).sum()
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
    rows = linearised(value, moves, range(parts.size) if prompts is None else prompts)
    return replace(mean_interval(rows, bounds=(0.0, 1.0), resampling=resampling), value=value)
