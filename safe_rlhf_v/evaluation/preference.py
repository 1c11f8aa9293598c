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
    scores: ArrayLike, more_helpful: ArrayLike, *, resampling: Resampling = DEFAULT
) -> PreferenceMetrics:
    """Reward model on N held-out pairs. scores (N, 2) in data-set order, more_helpful (N,) 0 or 1.

    Calibration is of the Bradley-Terry confidence sigmoid(|R_0 - R_1|) in the response it prefers.
    """
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(more_helpful, dtype=np.int64)
    found = _ranking(pairs, index, resampling)
    margin = pairs[:, 0] - pairs[:, 1]
    return found.model_copy(update=_calibration(sigmoid(np.abs(margin)), (margin > 0) == (index == 0)))


def cost_metrics(
    scores: ArrayLike, safer: ArrayLike, unsafe: ArrayLike, *, resampling: Resampling = DEFAULT
) -> PreferenceMetrics:
    """Cost model on N held-out pairs. scores (N, 2), safer (N,) 0 or 1, unsafe (N, 2) bool, all in data-set order.

    Ranking is right where the UNSAFER response costs more. Calibration is of P(unsafe) = sigmoid(C), the model of the
    sign term of the loss (arXiv 2503.17682 [code]).
    """
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(safer, dtype=np.int64)
    costs, flags = pairs.reshape(-1), np.asarray(unsafe, dtype=bool).reshape(-1)
    if costs.size != flags.size:
        raise ValueError(
            f"scores has shape {pairs.shape} but unsafe has {flags.size} entries; give one label per response"
        )
    found = _ranking(pairs, 1 - index, resampling)
    signs = {
        "sign_accuracy": sign_accuracy(costs, flags),
        "balanced_accuracy": balanced_accuracy(costs > 0, flags),
        "auc": auc(costs, flags),
    }
    return found.model_copy(update=signs | _calibration(sigmoid(costs), flags))


def _ranking(pairs: Array, higher: NDArray[np.int64], resampling: Resampling) -> PreferenceMetrics:
    accuracy = ranking_accuracy(pairs, higher)  # checks the shapes too
    rows = np.arange(len(higher))
    margin = pairs[rows, higher] - pairs[rows, 1 - higher]
    wins = (margin > 0) + (margin == 0) / 2
    interval = proportion_interval(wins, resampling=resampling)
    return PreferenceMetrics(accuracy=accuracy, interval=interval, n_pairs=len(higher))


def _calibration(probabilities: Array, outcomes: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "ece": expected_calibration_error(probabilities, outcomes),
        "bins": calibration_bins(probabilities, outcomes),
    }
