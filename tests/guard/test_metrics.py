"""Metrics against brute force and against values by hand."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from guard import metrics
from safe_rlhf_v.statistics import Resampling, bootstrap_counts, wilson

RNG = np.random.default_rng(0)
FEW = Resampling(draws=200)


def test_binary_against_brute_force() -> None:
    unsafe, scores = RNG.random(60) < 0.4, np.round(RNG.random(60), 1)  # rounded: ties
    flagged = scores >= 0.5
    got = metrics.binary_metrics(unsafe, scores, flagged, resampling=FEW)
    tp = sum(u and f for u, f in zip(unsafe, flagged, strict=True))
    assert got["precision"] == pytest.approx(tp / flagged.sum())
    assert got["recall"] == pytest.approx(tp / unsafe.sum())
    assert got["f1"] == pytest.approx(2 * tp / (flagged.sum() + unsafe.sum()))
    assert got["fpr"] == pytest.approx((flagged & ~unsafe).sum() / (~unsafe).sum())
    # average precision: sum over thresholds of (recall step) * precision
    ap, last = 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        taken = scores >= t
        recall, precision = (unsafe & taken).sum() / unsafe.sum(), (unsafe & taken).sum() / taken.sum()
        ap, last = ap + (recall - last) * precision, recall
    assert got["auprc"] == pytest.approx(ap)
    best = max(
        (unsafe & (scores >= t)).sum() / unsafe.sum()
        for t in [*set(scores), 2]
        if (~unsafe & (scores >= t)).mean() == 0
    )
    assert got["recall_at_1_fpr"] == pytest.approx(best)  # 36 safe rows: 1 % of them is none


def test_recall_at_one_percent_uses_its_allowance() -> None:
    # 200 safe rows, two of them (1 %) above the last unsafe one: all three unsafe rows may be reached; with three, one
    scores = np.concatenate([[0.9, 0.7, 0.6], [0.8, 0.65], np.linspace(0, 0.5, 198)])
    unsafe = np.arange(203) < 3
    recall = lambda s: metrics.binary_metrics(unsafe, s, s > 0.5, resampling=None)["recall_at_1_fpr"]  # noqa: E731
    assert recall(scores) == 1
    scores[5:7] = 0.85
    assert recall(scores) == pytest.approx(1 / 3)


def test_weighted_ranking_figures_are_those_of_scikit_learn() -> None:
    unsafe, scores = RNG.random(80) < 0.3, np.round(RNG.random(80), 1)
    weights = next(bootstrap_counts(range(80), Resampling(draws=100, seed=2)))[:30]
    got = metrics._binary_values(unsafe, scores, scores > 0.5, weights)
    for k, w in enumerate(weights):
        assert got["auprc"][k] == pytest.approx(sk.average_precision_score(unsafe, scores, sample_weight=w))
        false, true, _ = sk.roc_curve(unsafe, scores, sample_weight=w, drop_intermediate=False)
        assert got["recall_at_1_fpr"][k] == pytest.approx(true[false <= 0.01].max())
        assert got["f1"][k] == pytest.approx(sk.f1_score(unsafe, scores > 0.5, sample_weight=w))


def test_undefined_rates_are_none() -> None:
    got = metrics.binary_metrics(np.zeros(4, bool), np.full(4, 0.2), np.zeros(4, bool), resampling=FEW)
    assert got["recall"] is None and got["precision"] is None and got["auprc"] is None
    assert got["fpr"] == 0.0 and "recall" not in got["intervals"]
    assert metrics.severity_metrics(np.array([], int), np.array([], int)) == {"n": 0}


def test_the_fpr_has_the_interval_of_every_other_share() -> None:
    # 400 harmless prompts, 10 % flagged: Wilson of 40 of 400
    flagged = np.arange(400) < 40
    got = metrics.binary_metrics(np.zeros(400, bool), flagged.astype(float), flagged, resampling=FEW)
    interval = got["intervals"]["fpr"]
    assert (interval["low"], interval["high"], interval["n"]) == (*wilson(40, 400), 400)
    # the same rows as 40 prompts of ten that agree: Wilson of 4 of 40
    prompts = [i // 10 for i in range(400)]
    got = metrics.binary_metrics(np.zeros(400, bool), flagged.astype(float), flagged, prompts, resampling=FEW)
    interval = got["intervals"]["fpr"]
    assert (interval["low"], interval["high"], interval["n"]) == (*wilson(4, 40), 40)


def test_a_guard_without_a_mistake_is_not_certain() -> None:
    """Every resample of a faultless guard is faultless: what is left is what 20 unsafe prompts cannot rule out."""
    unsafe = np.arange(50) < 20
    got = metrics.binary_metrics(unsafe, unsafe.astype(float), unsafe, resampling=FEW)
    room = wilson(0, 20)[1]
    for name in ("precision", "recall", "f1", "auprc", "recall_at_1_fpr"):
        interval = got["intervals"][name]
        assert (interval["value"], interval["high"], interval["n"]) == (1.0, 1.0, 20)
        assert interval["low"] == pytest.approx(1 - room)


def test_the_interval_of_f1_covers() -> None:
    """100 guards on 60 prompts of two rows each, recall .7 and FPR .2: true F1 = 2 * .35 / (.35 + .1 + .5)."""
    rng, truth, covered = np.random.default_rng(7), 0.7 / 0.95, 0
    prompts = [i // 2 for i in range(120)]
    for _ in range(100):
        unsafe = np.repeat(rng.random(60) < 0.5, 2)
        flagged = rng.random(120) < np.where(unsafe, 0.7, 0.2)
        got = metrics.binary_metrics(unsafe, flagged.astype(float), flagged, prompts, resampling=FEW)
        covered += got["intervals"]["f1"]["low"] <= truth <= got["intervals"]["f1"]["high"]
    assert covered >= 88


def test_severity_by_hand() -> None:
    truth, predicted = np.array([0, 1, 2, 3, 3]), np.array([0, 0, 2, 1, 3])
    got = metrics.severity_metrics(truth, predicted)
    assert got["accuracy"] == pytest.approx(3 / 5) and got["within_one"] == pytest.approx(4 / 5)
    assert got["mae"] == pytest.approx((1 + 2) / 5)
    assert got["under_severity"] == pytest.approx(2 / 5) and got["under_severity_of_harmful"] == pytest.approx(2 / 4)
    # >= moderate: truth {2,3,4}, predicted {2,4}: F1 = 2*2 / (3 + 2)
    assert got["f1_at_least_moderate"] == pytest.approx(0.8)
    # kappa = 1 - sum observed d^2 / sum expected d^2, expectation over independent draws of the two margins
    observed = sum((t - p) ** 2 for t, p in zip(truth, predicted, strict=True)) / 5
    expected = sum((t - p) ** 2 for t, p in itertools.product(truth, predicted)) / 25
    assert got["quadratic_kappa"] == pytest.approx(1 - observed / expected)
    assert metrics.severity_metrics(np.array([2, 2]), np.array([2, 2]))["quadratic_kappa"] is None


def test_categories_leave_unknown_rows_out() -> None:
    labels = np.array([[1, 0, 0], [0, 0, -1], [1, 0, 1], [-1, 0, 1]])
    scores = np.array([[0.9, 0.6, 0.1], [0.7, 0.1, 0.9], [0.4, 0.2, 0.8], [0.99, 0.1, 0.7]])
    got = metrics.category_metrics(labels, scores, ["a", "b", "c"])
    # a: rows 0-2, truth 1 0 1, flagged 1 1 0: F1 = 2/(2+2); ranked 1 0 1: AP = 1/2*1 + 1/2*2/3
    assert got["categories"]["a"] == {"f1": 0.5, "ap": pytest.approx(5 / 6), "support": 2}
    assert got["categories"]["b"] == {"f1": None, "ap": None, "support": 0}
    assert got["categories"]["c"]["f1"] == 1.0 and got["supported"] == 2
    assert got["macro_f1"] == pytest.approx(0.75)


def test_calibration_by_hand() -> None:
    # two bins: {.1, .2} with truth 0, 1 -> |.5 - .15| ; {.9, .9} with truth 1, 1 -> |1 - .9|
    truth, p = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.9, 0.9])
    got = metrics.binary_calibration(truth, p, bins=2)
    assert got["ece"] == pytest.approx(0.5 * 0.35 + 0.5 * 0.1)
    assert got["brier"] == pytest.approx((0.01 + 0.64 + 0.01 + 0.01) / 4)
    # severity: top probabilities .7 (hit) and .4 (miss), one bin: |.5 - .55|
    probabilities = np.array([[0.7, 0.2, 0.1, 0.0], [0.4, 0.2, 0.2, 0.2]])
    got = metrics.severity_calibration(np.array([0, 2]), probabilities, bins=1)
    assert got["ece"] == pytest.approx(0.05)
    assert got["brier"] == pytest.approx((0.09 + 0.04 + 0.01 + 0.16 + 0.04 + 0.64 + 0.04) / 2)


def test_certain_probabilities_fall_into_the_last_bin() -> None:
    # one bin: |(1 - .95) + (0 - 1)| / 2, where two would give (.05 + 1) / 2
    assert metrics.binary_calibration(np.array([1, 0]), np.array([0.95, 1.0]))["ece"] == pytest.approx(0.475)


def test_severity_figures_are_those_of_scikit_learn_under_any_weights() -> None:
    truth, predicted = RNG.integers(0, 4, 90), RNG.integers(0, 4, 90)
    weights = next(bootstrap_counts(range(90), Resampling(draws=100, seed=4)))[:20]
    got = metrics._severity_values(truth, predicted, weights)
    for k, w in enumerate(weights):
        kappa = sk.cohen_kappa_score(truth, predicted, weights="quadratic", sample_weight=w)
        assert got["quadratic_kappa"][k] == pytest.approx(kappa)
        assert got["macro_f1"][k] == pytest.approx(sk.f1_score(truth, predicted, average="macro", sample_weight=w))
        assert got["mae"][k] == pytest.approx(np.average(abs(truth - predicted), weights=w))
        severe = sk.f1_score(truth >= 3, predicted >= 3, sample_weight=w)
        assert got["f1_at_least_severe"][k] == pytest.approx(severe)


def test_the_interval_of_kappa_covers() -> None:
    """100 guards on 80 prompts of two equal rows; each level right with .6, else any of the four alike."""
    rng, covered = np.random.default_rng(3), 0
    joint = np.full((4, 4), 0.1 / 4) + np.eye(4) * 0.6 / 4  # true kappa from this table
    d2 = np.subtract.outer(np.arange(4), np.arange(4)) ** 2
    kappa = 1 - (joint * d2).sum() / (np.outer(joint.sum(1), joint.sum(0)) * d2).sum()
    for _ in range(100):
        truth = np.repeat(rng.integers(0, 4, 80), 2)
        judged = np.where(np.repeat(rng.random(80) < 0.6, 2), truth, np.repeat(rng.integers(0, 4, 80), 2))
        got = metrics.severity_intervals(truth, judged, [i // 2 for i in range(160)], FEW)["quadratic_kappa"]
        covered += got["low"] <= kappa <= got["high"]
    assert covered >= 88


def test_intervals_of_categories_and_calibration_hold_their_figures() -> None:
    labels, scores = RNG.integers(-1, 2, (50, 2)), RNG.random((50, 2))
    prompts = [i // 2 for i in range(50)]
    figures = metrics.category_metrics(labels, scores, ["a", "b"])["categories"]
    found = metrics.category_intervals(labels, scores, ["a", "b"], prompts, resampling=FEW)
    for name in "ab":
        for key in ("f1", "ap"):
            interval = found[name][key]
            assert interval["value"] == pytest.approx(figures[name][key]) and interval["low"] < interval["high"]
    truth = RNG.random(50) < 0.5
    intervals = metrics.binary_calibration_intervals(truth, scores[:, 0], prompts, resampling=FEW)
    for key, value in metrics.binary_calibration(truth, scores[:, 0]).items():
        assert intervals[key]["value"] == pytest.approx(value) and intervals[key]["low"] <= value
