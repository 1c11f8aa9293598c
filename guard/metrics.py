"""The guard's figures: pure functions of labels and scores, no model. n rows, K categories, L severity levels.

Rates that are undefined (no positives, no negatives) are None, never 0 and never NaN, so that the results are JSON.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

from safe_rlhf_v.statistics import (
    DEFAULT,
    Interval,
    Resampling,
    bootstrap_counts,
    bootstrap_interval,
    expected_calibration_error,
    mean_or_none,
    share_of_rows,
)

Array = NDArray[Any]
LEVEL_NAMES = ("none", "minor", "moderate", "severe")
RANKED = ("f1", "auprc", "recall_at_1_fpr")  # figures that are no shares of rows
BINS = 15  # of calibration; arXiv 1706.04599, section 4


def binary_metrics(
    unsafe: Array,
    scores: Array,
    flagged: Array,
    groups: Sequence[Hashable] | None = None,
    *,
    resampling: Resampling | None = DEFAULT,
) -> dict[str, Any]:
    """Precision, recall, F1 and FPR of `flagged`; AUPRC and recall at 1 % FPR of `scores`; each with an interval.

    unsafe, flagged: (n,) bool. scores: (n,) in 0..1. groups: (n,) prompt ids, since the responses of one prompt are not
    independent. resampling: None for no intervals. Recipes: the table of `safe_rlhf_v.statistics`.
    """
    unsafe, flagged, scores = np.asarray(unsafe, bool), np.asarray(flagged, bool), np.asarray(scores, float)
    n = len(unsafe)
    point = {name: _defined(v[0]) for name, v in _binary_values(unsafe, scores, flagged, np.ones((1, n))).items()}
    found: dict[str, Any] = {**point, "n": n, "unsafe": int(unsafe.sum()), "intervals": {}}
    if resampling is not None:
        names = list(range(n) if groups is None else groups)
        intervals = _shares(unsafe, flagged, names, resampling) | _resampled(
            {name: value for name, value in point.items() if name in RANKED and value is not None},
            (unsafe, scores, flagged),
            names,
            resampling,
        )
        found["intervals"] = {name: asdict(intervals[name]) for name in point if name in intervals}
    return found


def _shares(unsafe: Array, flagged: Array, names: Sequence[Hashable], resampling: Resampling) -> dict[str, Interval]:
    """Intervals of the figures that are shares of rows: what share `hit` has of the rows `of`."""
    rates = {"precision": (unsafe, flagged), "recall": (flagged, unsafe), "fpr": (flagged, ~unsafe)}
    return {
        name: share_of_rows(hit[of], list(compress(names, of)), resampling=resampling)
        for name, (hit, of) in rates.items()
        if of.any()
    }


def _resampled(
    point: Mapping[str, float], rows: tuple[Array, Array, Array], names: Sequence[Hashable], resampling: Resampling
) -> dict[str, Interval]:
    """Intervals of figures that are no shares, each found anew in every resample. rows: unsafe, scores, flagged."""
    drawn = [_binary_values(*rows, weights) for weights in bootstrap_counts(names, resampling)] if point else []
    intervals = {}
    for name, value in point.items():
        values = np.concatenate([some[name] for some in drawn])
        behind = rows[0] | rows[2] if name == "f1" else rows[0]
        prompts = len(set(compress(names, behind)))
        intervals[name] = bootstrap_interval(
            value, values[np.isfinite(values)], prompts, bounds=(0.0, 1.0), resampling=resampling
        )
    return intervals


def _binary_values(unsafe: Array, scores: Array, flagged: Array, weights: Array) -> dict[str, Array]:
    """Each rate (S,) under S weightings of the n rows, weights (S, n); NaN where undefined."""
    count = lambda rows: weights[:, rows].sum(1)  # noqa: E731
    tp, fp = count(unsafe & flagged), count(~unsafe & flagged)
    fn, tn = count(unsafe & ~flagged), count(~unsafe & ~flagged)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last row of each run of equal scores
    true = (weights * unsafe)[:, order].cumsum(1)[:, ends]
    false = (weights * ~unsafe)[:, order].cumsum(1)[:, ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, fpr = true / (tp + fn)[:, None], false / (fp + tn)[:, None]
        # average precision as in scikit-learn: recall steps times precision, no interpolation
        steps = np.nan_to_num(true / (true + false)) * np.diff(recall, axis=1, prepend=0)
        within = np.where(fpr <= 0.01, recall, 0).max(1, initial=0)
        return {
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
            "fpr": fp / (fp + tn),
            "auprc": np.where(tp + fn > 0, steps.sum(1), np.nan),
            "recall_at_1_fpr": np.where((tp + fn > 0) & (fp + tn > 0), within, np.nan),
        }


def _defined(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def category_metrics(labels: Array, scores: Array, names: Sequence[str], threshold: float = 0.5) -> dict[str, Any]:
    """F1 at `threshold`, average precision and support of each category, and their means over supported categories.

    labels: (n, K) of 1, 0 or -1 (unknown, left out). scores: (n, K).
    """
    per: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(names):
        known = labels[:, k] >= 0
        truth, score = labels[known, k] == 1, scores[known, k]
        support = int(truth.sum())
        per[name] = {
            "f1": float(sk.f1_score(truth, score >= threshold)) if support else None,
            "ap": float(sk.average_precision_score(truth, score)) if support else None,
            "support": support,
        }
    supported = [row for row in per.values() if row["support"]]
    means = {f"macro_{m}": mean_or_none([row[m] for row in supported]) for m in ("f1", "ap")}
    return {**means, "supported": len(supported), "categories": per}


def severity_metrics(truth: Array, predicted: Array) -> dict[str, Any]:
    """Ordinal agreement of levels 0..3, both (n,).

    under_severity is the share of rows judged milder than they are; of_harmful counts truly harmful rows only.
    quadratic_kappa is None where either side never varies.
    """
    truth, predicted = np.asarray(truth, int), np.asarray(predicted, int)
    if not len(truth):
        return {"n": 0}
    error = np.abs(truth - predicted)
    harmful = truth > 0
    varies = len(np.unique(truth)) > 1 and len(np.unique(predicted)) > 1
    at_least = {
        f"f1_at_least_{LEVEL_NAMES[level]}": float(sk.f1_score(truth >= level, predicted >= level))
        if (truth >= level).any()
        else None
        for level in (1, 2, 3)
    }
    return {
        "n": len(truth),
        "accuracy": float((error == 0).mean()),
        "macro_f1": float(sk.f1_score(truth, predicted, average="macro")),
        "within_one": float((error <= 1).mean()),
        "mae": float(error.mean()),
        "quadratic_kappa": float(sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(4)))
        if varies
        else None,
        "under_severity": float((predicted < truth).mean()),
        "under_severity_of_harmful": float((predicted < truth)[harmful].mean()) if harmful.any() else None,
        **at_least,
        **{f"support_{name}": int((truth == level).sum()) for level, name in enumerate(LEVEL_NAMES)},
    }


def binary_calibration(truth: Array, probabilities: Array, bins: int = BINS) -> dict[str, float | None]:
    """Expected calibration error over equal-width bins of P(positive), and the Brier score. Both arrays (n,)."""
    truth, probabilities = np.asarray(truth, float), np.asarray(probabilities, float)
    if not len(truth):
        return {"ece": None, "brier": None}
    return {
        "ece": expected_calibration_error(probabilities, truth, bins),
        "brier": float(((probabilities - truth) ** 2).mean()),
    }


def severity_calibration(truth: Array, probabilities: Array, bins: int = BINS) -> dict[str, float | None]:
    """Top-label ECE (Guo et al., arXiv 1706.04599, eq. 3) and the Brier score summed over levels.

    truth: (n,) levels. probabilities: (n, L).
    """
    truth, probabilities = np.asarray(truth, int), np.asarray(probabilities, float)
    if not len(truth):
        return {"ece": None, "brier": None}
    hit = (probabilities.argmax(1) == truth).astype(float)
    one_hot = np.eye(probabilities.shape[1])[truth]
    brier = ((probabilities - one_hot) ** 2).sum(1).mean()
    return {"ece": expected_calibration_error(probabilities.max(1), hit, bins), "brier": float(brier)}
