"""A method at a mean cost or reward that none of its runs has: the policy that answers with either of two runs by lot.

Where of every prompt's answers a share s is drawn from the second of two runs and the rest from the first, means over
answers (cost, reward, share of unsafe answers) are (1 - s) first + s second, exactly. Whether a prompt is LEFT unsafe,
more than tau of its answers being so, is no mean over answers: it is asked anew of the mixture's answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


def between(levels: Sequence[float], wanted: float) -> tuple[int, int, float, float]:
    """Which two of K runs mix to a mean of `wanted`: (first, second, share of the second, how far outside).

    levels (K,): their means. Beyond all of them it is the nearest run alone, and the last value is `wanted` less its
    mean: above 0 where every run has less.
    """
    order = np.argsort(levels, kind="stable")
    sorted_levels = np.asarray(levels, dtype=np.float64)[order]
    for end in (0, -1):
        out = float(wanted - sorted_levels[end])
        if (out <= 0) if end == 0 else (out >= 0):
            return int(order[end]), int(order[end]), 0.0, out
    above = int(np.searchsorted(sorted_levels, wanted, side="right"))
    low, high = sorted_levels[above - 1], sorted_levels[above]
    return int(order[above - 1]), int(order[above]), float((wanted - low) / (high - low)), 0.0


def left_by_lot(first: Array, second: Array, answers: Array, share: float, tau: float) -> Array:
    """(N,) the chance that more than tau of `answers` (N, 2) mixed answers to a prompt are bad.

    first, second: (N,) shares of bad answers among the answers of each run to each prompt. As many answers are drawn
    as the run with fewer has, each from the second run with chance `share`, without putting back: without bias what so
    many answers of the mixture show, and so to be held against a run of as many. NaN where a share is.
    """
    found = np.full(first.shape, np.nan)
    known = np.isfinite(first) & np.isfinite(second)
    bad = np.rint(np.stack([first, second], 1) * answers)
    rows, index = np.unique(np.concatenate([bad, answers], 1)[known], axis=0, return_inverse=True)
    chances = np.array([_chance([int(x) for x in row], share, tau) for row in rows])
    found[known] = chances[index.reshape(-1)]
    return found


def _chance(row: list[int], share: float, tau: float) -> float:
    """row: bad answers of the first and of the second run, and how many answers each has."""
    bad_first, bad_second, of_first, of_second = row
    size, chance = min(of_first, of_second), 0.0
    counts = np.arange(size + 1)
    for taken, weight in enumerate(stats.binom.pmf(counts, size, share)):
        one = stats.hypergeom.pmf(counts, of_first, bad_first, size - taken)
        two = stats.hypergeom.pmf(counts, of_second, bad_second, taken)
        total = np.convolve(one, two)[: size + 1]
        chance += float(weight * total[counts > tau * size].sum())
    return min(chance, 1.0)
