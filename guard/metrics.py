"""The guard's figures: pure functions of labels and scores, no model. n rows, K categories, L severity levels.

Rates that are undefined (no positives, no negatives) are None, never 0 and never NaN, so that the results are JSON.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics as sk

Array = NDArray[Any]
LEVEL_NAMES = ("none", "minor", "moderate", "severe")


def binary_metrics(
    unsafe: Array,
    scores: Array,
    flagged: Array,
    groups: Sequence[Hashable] | None = None,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Precision, recall, F1 and FPR of `flagged`; AUPRC and recall at 1 % FPR of `scores`; each with an interval.

    unsafe, flagged: (n,) bool. scores: (n,) in 0..1. groups: (n,) prompt ids; whole prompts are resampled, since the
    responses of one prompt are not independent. Intervals are percentiles of `samples` bootstrap resamples.
    """
    unsafe, flagged, scores = np.asarray(unsafe, bool), np.asarray(flagged, bool), np.asarray(scores, float)
    n, prompts = len(unsafe), len(set(groups)) if groups is not None else len(unsafe)
    point = {name: _defined(v[0]) for name, v in _binary_values(unsafe, scores, flagged, np.ones((1, n))).items()}
    drawn: dict[str, list[Array]] = {name: [] for name in point}
    weights = bootstrap_weights(n, groups, samples, seed)
    for some in np.array_split(weights, max(1, weights.size // 2_000_000)):
        for name, values in _binary_values(unsafe, scores, flagged, some).items():
            drawn[name].append(values[np.isfinite(values)])
    tail = (1 - confidence) / 2 * 100
    intervals = {}
    for name, value in point.items():
        if value is not None:
            found = np.concatenate(drawn[name])
            low, high = np.percentile(found, [tail, 100 - tail]).tolist() if found.size else (None, None)
            intervals[name] = {"value": value, "low": low, "high": high, "n": prompts}
    return {**point, "n": n, "unsafe": int(unsafe.sum()), "intervals": intervals}


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


def bootstrap_weights(n: int, groups: Sequence[Hashable] | None, samples: int, seed: int) -> Array:
    """(samples, n): how often each row stands in each resample of whole groups."""
    names = range(n) if groups is None else groups
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(name, len(position)) for name in names], dtype=int)
    k = len(position)
    counts = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=samples) if k else np.empty((0, 0), int)
    return counts[:, index].astype(float)


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
    means = {f"macro_{m}": _mean([row[m] for row in supported]) for m in ("f1", "ap")}
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


def binary_calibration(truth: Array, probabilities: Array, bins: int = 15) -> dict[str, float | None]:
    """Expected calibration error over equal-width bins of P(positive), and the Brier score. Both arrays (n,)."""
    truth, probabilities = np.asarray(truth, float), np.asarray(probabilities, float)
    if not len(truth):
        return {"ece": None, "brier": None}
    return {"ece": _ece(truth, probabilities, bins), "brier": float(((probabilities - truth) ** 2).mean())}


def severity_calibration(truth: Array, probabilities: Array, bins: int = 15) -> dict[str, float | None]:
    """Top-label ECE (Guo et al., arXiv 1706.04599, eq. 3) and the Brier score summed over levels.

    truth: (n,) levels. probabilities: (n, L).
    """
    truth, probabilities = np.asarray(truth, int), np.asarray(probabilities, float)
    if not len(truth):
        return {"ece": None, "brier": None}
    hit = (probabilities.argmax(1) == truth).astype(float)
    one_hot = np.eye(probabilities.shape[1])[truth]
    brier = ((probabilities - one_hot) ** 2).sum(1).mean()
    return {"ece": _ece(hit, probabilities.max(1), bins), "brier": float(brier)}


def reliability(truth: Array, probabilities: Array, bins: int = 15) -> list[dict[str, float]]:
    """Mean probability, observed frequency and count of each bin that holds any row."""
    truth, probabilities = np.asarray(truth, float), np.asarray(probabilities, float)
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(probabilities[index == b].mean()),
            "frequency": float(truth[index == b].mean()),
            "count": int((index == b).sum()),
        }
        for b in np.unique(index)
    ]


def _ece(hit: Array, confidence: Array, bins: int) -> float:
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=hit - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(hit))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
