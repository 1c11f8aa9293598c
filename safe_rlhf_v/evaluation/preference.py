"""Metrics of a trained reward or cost model on held-out pairs, from plain score arrays."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safe_rlhf_v.evaluation.report_data import PreferenceMetrics
from safe_rlhf_v.statistics import (
    DEFAULT,
    Array,
    Ranked,
    Resampling,
    auc_interval,
    balanced_accuracy_interval,
    calibration_bins,
    expected_calibration_error,
    ranked,
    share_of_rows,
    sigmoid,
    sign_accuracy,
)


def reward_metrics(
    scores: ArrayLike,
    more_helpful: ArrayLike,
    tied: ArrayLike | None = None,
    *,
    prompts: Sequence[Hashable] | None = None,
    resampling: Resampling = DEFAULT,
) -> PreferenceMetrics:
    """Reward model on N held-out pairs. scores (N, 2) in data-set order, more_helpful (N,) 0 or 1.

    tied: (N,) bool, pairs of equal rates, whose label was forced: they count in accuracy_tied and n_tied alone.
    prompts: id of each pair's prompt, whose pairs the interval takes for one piece of evidence.
    Calibration is of the Bradley-Terry confidence sigmoid(|R_0 - R_1|) in the response it prefers; a tie is half right.
    """
    pairs = ranked(scores, more_helpful, tied)
    margin = pairs.margin[pairs.told]
    found = _ranking(pairs, prompts, resampling)
    return found.model_copy(update=_calibration(sigmoid(np.abs(margin)), pairs.wins[pairs.told]))


def cost_metrics(
    scores: ArrayLike,
    safer: ArrayLike,
    unsafe: ArrayLike,
    tied: ArrayLike | None = None,
    *,
    prompts: Sequence[Hashable] | None = None,
    resampling: Resampling = DEFAULT,
) -> PreferenceMetrics:
    """Cost model on N held-out pairs. scores (N, 2), safer (N,) 0 or 1, unsafe (N, 2) bool, all in data-set order.

    tied, prompts: as for `reward_metrics`, tied by harmless rate; the signs count their responses too.
    Ranking is right where the UNSAFER response costs more. Calibration is of P(unsafe) = sigmoid(C), the model of the
    sign term of the loss (arXiv 2503.17682 [code]).
    """
    pairs = ranked(scores, 1 - np.asarray(safer, dtype=np.int64), tied)
    costs, flags = np.asarray(scores, dtype=np.float64).reshape(-1), np.asarray(unsafe, dtype=bool).reshape(-1)
    if costs.size != flags.size:
        raise ValueError(f"{costs.size} scores but unsafe has {flags.size} entries; give one label per response")
    found = _ranking(pairs, prompts, resampling)
    keys = [key for key in (range(pairs.told.size) if prompts is None else prompts) for _ in range(2)]
    balanced = balanced_accuracy_interval(costs > 0, flags, keys, resampling=resampling)
    area = auc_interval(costs, flags, keys, resampling=resampling)
    signs = {
        "sign_accuracy": sign_accuracy(costs, flags),
        "balanced_accuracy": balanced and balanced.value,
        "balanced_accuracy_interval": balanced,
        "auc": area and area.value,
        "auc_interval": area,
    }
    return found.model_copy(update=signs | _calibration(sigmoid(costs), flags))


def read_preference(folder: Path, kind: Literal["reward", "cost"]) -> PreferenceMetrics | None:
    """A reward or cost model's held-out figures, from the scores that its training left; None without them."""
    file = folder / "evaluation_scores.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not rows:
        return None
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    prompts = columns["prompt_id"].tolist()
    if kind == "reward":
        return reward_metrics(columns["scores"], columns["more_helpful"], columns["tied_helpfulness"], prompts=prompts)
    return cost_metrics(columns["scores"], columns["safer"], columns["unsafe"], columns["tied_safety"], prompts=prompts)


def _ranking(pairs: Ranked, prompts: Sequence[Hashable] | None, resampling: Resampling) -> PreferenceMetrics:
    """Ranking accuracy of the pairs whose label says something, with its interval, and of the others."""
    told = pairs.told
    keys = np.arange(told.size) if prompts is None else np.asarray(prompts)
    interval = share_of_rows(pairs.wins[told], keys[told].tolist(), resampling=resampling) if told.any() else None
    return PreferenceMetrics(
        accuracy=None if interval is None else interval.value,
        interval=interval,
        n_pairs=pairs.pairs,
        accuracy_tied=pairs.accuracy_tied,
        n_tied=pairs.pairs_tied,
    )


def _calibration(probabilities: Array, outcomes: NDArray[Any]) -> dict[str, Any]:
    if not len(outcomes):
        return {}
    return {
        "ece": expected_calibration_error(probabilities, outcomes),
        "bins": calibration_bins(probabilities, outcomes),
    }
