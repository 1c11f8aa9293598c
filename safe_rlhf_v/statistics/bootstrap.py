"""The one way in which the project resamples: whole prompts, with replacement."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
AT_ONCE = 2_000_000  # bounds memory: 16 MB of numbers


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


def _drawn(n: int, resampling: Resampling, width: int) -> Iterator[NDArray[np.int64]]:
    """Which of n prompts stand in each resample, (some of the draws, n) at a time. Deterministic in the seed.

    width: numbers that the caller makes of a resample.
    """
    rng, draws = np.random.default_rng(resampling.seed), resampling.draws
    some = max(1, AT_ONCE // width)
    for start in range(0, draws, some):
        yield rng.integers(0, n, (min(some, draws - start), n))


def bootstrap_means(values: Array, resampling: Resampling = DEFAULT) -> Array:
    """Means (draws,) of resamples of `values` (N,), one a prompt."""
    return np.concatenate([values[index].mean(axis=1) for index in _drawn(values.size, resampling, values.size)])


def bootstrap_counts(prompts: Sequence[Hashable], resampling: Resampling = DEFAULT) -> Iterator[Array]:
    """How often each of the rows of `prompts` (B,) stands in each resample: (some of the draws, B) at a time.

    For figures that are no means, such as F1: evaluate them with these weights.
    """
    position: dict[Hashable, int] = {}
    row = np.array([position.setdefault(name, len(position)) for name in prompts], dtype=np.int64)
    n = len(position)
    for index in _drawn(n, resampling, len(row)):
        start = n * np.arange(len(index))[:, None]
        counts = np.bincount((index + start).ravel(), minlength=index.size).reshape(index.shape)
        yield counts[:, row].astype(np.float64)
