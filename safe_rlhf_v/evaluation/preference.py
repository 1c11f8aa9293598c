"""Metrics of a trained reward or cost model on held-out pairs, from plain score arrays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from safe_rlhf_v.evaluation.report_data import PreferenceMetrics
from safe_rlhf_v.evaluation.statistics import (
    DEFAULT,
    Array,
    Interval,
    Resampling,
    auc_interval,
    balanced_accuracy_interval,
    calibration_bins,
    expected_calibration_error,
    per_prompt,
    proportion_interval,
    ranking_accuracy,
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
    Calibration is of the Bradley-Terry confidence sigmoid(|R_0 - R_1|) in the response it prefers.
    """
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(more_helpful, dtype=np.int64)
    found, told = _ranking(pairs, index, tied, prompts, resampling)
    margin = (pairs[:, 0] - pairs[:, 1])[told]
    return found.model_copy(update=_calibration(sigmoid(np.abs(margin)), (margin > 0) == (index[told] == 0)))


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
    pairs, index = np.asarray(scores, dtype=np.float64), np.asarray(safer, dtype=np.int64)
    costs, flags = pairs.reshape(-1), np.asarray(unsafe, dtype=bool).reshape(-1)
    if costs.size != flags.size:
        raise ValueError(
            f"scores has shape {pairs.shape} but unsafe has {flags.size} entries; give one label per response"
        )
    found, _ = _ranking(pairs, 1 - index, tied, prompts, resampling)
    keys = [key for key in (range(len(pairs)) if prompts is None else prompts) for _ in range(2)]
    balanced = balanced_accuracy_interval(costs > 0, flags, keys, resampling=resampling)
    ranked = auc_interval(costs, flags, keys, resampling=resampling)
    signs = {
        "sign_accuracy": sign_accuracy(costs, flags),
        "balanced_accuracy": balanced and balanced.value,
        "balanced_accuracy_interval": balanced,
        "auc": ranked and ranked.value,
        "auc_interval": ranked,
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


def _ranking(
    pairs: Array,
    higher: NDArray[np.int64],
    tied: ArrayLike | None,
    prompts: Sequence[Hashable] | None,
    resampling: Resampling,
) -> tuple[PreferenceMetrics, NDArray[np.bool_]]:
    """Ranking accuracy of the pairs whose label says something, and which those are (N,)."""
    ranking_accuracy(pairs, higher)  # checks the shapes
    rows = np.arange(len(higher))
    margin = pairs[rows, higher] - pairs[rows, 1 - higher]
    wins = (margin > 0) + (margin == 0) / 2
    told = ~np.asarray(tied, dtype=bool) if tied is not None else np.ones(len(higher), dtype=bool)
    keys = np.arange(len(higher)) if prompts is None else np.asarray(prompts)
    interval = _by_prompt(wins[told], keys[told].tolist(), resampling) if told.any() else None
    return PreferenceMetrics(
        accuracy=None if interval is None else interval.value,
        interval=interval,
        n_pairs=int(told.sum()),
        accuracy_tied=None if told.all() else float(wins[~told].mean()),
        n_tied=int((~told).sum()),
    ), told


def _by_prompt(wins: Array, prompts: Sequence[Hashable], resampling: Resampling) -> Interval:
    """The mean of wins (N,) with an interval that resamples prompts, each with all its pairs.

    acc + (n_i / mean n) (acc_i - acc), of a prompt with n_i pairs, has the mean acc and, between prompts, the variance
    of the ratio of sums (linearised). Where all prompts have equally many pairs it is acc_i.
    """
    means, counts = per_prompt(wins, prompts), Counter(prompts)
    values = list(means.values())
    if len(set(counts.values())) > 1:
        overall, per = float(wins.mean()), len(prompts) / len(means)
        values = [overall + counts[key] / per * (mean - overall) for key, mean in means.items()]
    return proportion_interval(values, resampling=resampling)


def _calibration(probabilities: Array, outcomes: NDArray[np.bool_]) -> dict[str, Any]:
    if not len(outcomes):
        return {}
    return {
        "ece": expected_calibration_error(probabilities, outcomes),
        "bins": calibration_bins(probabilities, outcomes),
    }
