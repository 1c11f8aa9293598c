"""Whether probabilities are what they say. n rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from safe_rlhf_v.statistics.bootstrap import Array
from safe_rlhf_v.statistics.intervals import vector


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Answers whose predicted probability fell in one bin."""

    confidence: float
    frequency: float
    count: int


def calibration_bins(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> list[CalibrationBin]:
    """Reliability diagram: non-empty bins of equal width over 0..1; the last one closed."""
    p, hit = vector(probabilities, "probabilities"), np.asarray(outcomes, dtype=np.float64)
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
