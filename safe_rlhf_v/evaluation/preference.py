"""Metrics of a trained reward or cost model on held-out pairs, from plain score arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safe_rlhf_v.evaluation.report_data import PreferenceMetrics
from safe_rlhf_v.evaluation.statistics import (
    DEFAULT,
    Array,
    Resampling,
    auc,
    balanced_accuracy,
    calibration_bins,
    expected_calibration_error,
    proportion_interval,
    ranking_accuracy,
    sigmoid,
    sign_accuracy,
)


def reward_metrics(
    scores: ArrayLike, more_helpful: ArrayLike, tied: ArrayLike | None = None, *, resampling: Resampling = DEFAULT
) -> PreferenceMetrics:
    """Reward model on N held-out pairs. scores (N, 2) in data-set order, more_helpful (N,) 0 or 1.

    tied: (N,) bool, pairs of equal rates, whose label was forced: they count in accuracy_tied and n_tied alone.
    Calibration is of the Bradley-Terry confidence sigmoid(|R_0 - R_1|) in the response it prefers.
    """
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(more_helpful, dtype=np.int64)
    found, told = _ranking(pairs, index, tied, resampling)
    margin = (pairs[:, 0] - pairs[:, 1])[told]
    return found.model_copy(update=_calibration(sigmoid(np.abs(margin)), (margin > 0) == (index[told] == 0)))


def cost_metrics(
    scores: ArrayLike,
    safer: ArrayLike,
    unsafe: ArrayLike,
    tied: ArrayLike | None = None,
    *,
    resampling: Resampling = DEFAULT,
) -> PreferenceMetrics:
    """Cost model on N held-out pairs. scores (N, 2), safer (N,) 0 or 1, unsafe (N, 2) bool, all in data-set order.

    tied: as for `reward_metrics`, by harmless rate; the signs count their responses too.

    Ranking is right where the UNSAFER response costs more. Calibration is of P(unsafe) = sigmoid(C), the model of the
    sign term of the loss (arXiv 2503.17682 [code]).
    """
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(safer, dtype=np.int64)
    costs, flags = pairs.reshape(-1), np.asarray(unsafe, dtype=bool).reshape(-1)
    if costs.size != flags.size:
        raise ValueError(
            f"scores has shape {pairs.shape} but unsafe has {flags.size} entries; give one label per response"
        )
    found, _ = _ranking(pairs, 1 - index, tied, resampling)
    signs = {
        "sign_accuracy": sign_accuracy(costs, flags),
        "balanced_accuracy": balanced_accuracy(costs > 0, flags),
        "auc": auc(costs, flags),
    }
    return found.model_copy(update=signs | _calibration(sigmoid(costs), flags))


def _ranking(
    pairs: Array, higher: NDArray[np.int64], tied: ArrayLike | None, resampling: Resampling
) -> tuple[PreferenceMetrics, NDArray[np.bool_]]:
    """Ranking accuracy of the pairs whose label says something, and which those are (N,)."""
    ranking_accuracy(pairs, higher)  # checks the shapes
    rows = np.arange(len(higher))
    margin = pairs[rows, higher] - pairs[rows, 1 - higher]
    wins = (margin > 0) + (margin == 0) / 2
    told = ~np.asarray(tied, dtype=bool) if tied is not None else np.ones(len(higher), dtype=bool)
    interval = proportion_interval(wins[told], resampling=resampling) if told.any() else None
    return PreferenceMetrics(
        accuracy=None if interval is None else interval.value,
        interval=interval,
        n_pairs=int(told.sum()),
        accuracy_tied=None if told.all() else float(wins[~told].mean()),
        n_tied=int((~told).sum()),
    ), told


def _calibration(probabilities: Array, outcomes: NDArray[np.bool_]) -> dict[str, Any]:
    if not len(outcomes):
        return {}
    return {
        "ece": expected_calibration_error(probabilities, outcomes),
        "bins": calibration_bins(probabilities, outcomes),
    }
