"""Reward and cost metrics on pairs small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic import report_data

from safe_rlhf_v.evaluation.preference import cost_metrics, reward_metrics
from safe_rlhf_v.evaluation.report import render
from safe_rlhf_v.training import preference_metrics


def test_reward_metrics_by_hand() -> None:
    found = reward_metrics([[3, 1], [0, 2], [5, 1]], [0, 1, 1])
    assert found.accuracy == pytest.approx(2 / 3) and found.n_pairs == 3
    assert found.interval is not None and found.interval.value == pytest.approx(2 / 3)
    # confidences sigmoid(2) = .8808 right, twice, and sigmoid(4) = .9820 wrong: bins of their own
    assert found.ece == pytest.approx((2 * (1 - 0.8808) + 0.9820) / 3, abs=1e-4)
    assert found.sign_accuracy is None


def test_forced_ties_stand_apart_as_in_metrics_json() -> None:
    """Five pairs, two of them forced: right on 2 of 3 untied, on 1 of 2 tied; the training side says the same."""
    scores = [[3.0, 1.0], [0.0, 2.0], [5.0, 1.0], [4.0, 0.0], [1.0, 3.0]]
    label, tied = [0, 1, 1, 0, 0], [False, False, False, True, True]
    found = reward_metrics(scores, label, tied)
    assert found.accuracy == pytest.approx(2 / 3) and found.n_pairs == 3
    assert found.accuracy_tied == 0.5 and found.n_tied == 2
    assert found.interval == reward_metrics(scores[:3], label[:3]).interval and found.ece is not None
    assert found.bins == reward_metrics(scores[:3], label[:3]).bins
    assert "forced the label (2 and 0 further pairs)" in render(report_data(reward_model=found))
    unsafe = [[0, 1]] * 5
    costs = cost_metrics(scores, label, unsafe, tied)
    trained = {
        "reward": preference_metrics.reward_metrics(
            torch.tensor(scores), {"more_helpful": torch.tensor(label), "tied_helpfulness": torch.tensor(tied)}
        ),
        "cost": preference_metrics.cost_metrics(
            torch.tensor(scores),
            {"safer": torch.tensor(label), "tied_safety": torch.tensor(tied), "unsafe": torch.tensor(unsafe).bool()},
        ),
    }
    for measured, told in ((found, trained["reward"]), (costs, trained["cost"])):
        assert (measured.accuracy, measured.accuracy_tied) == pytest.approx((told["accuracy"], told["accuracy_tied"]))
        assert (measured.n_pairs, measured.n_tied) == (told["pairs"], told["pairs_tied"])
    assert costs.sign_accuracy == pytest.approx(trained["cost"]["sign_accuracy"])  # of all ten responses


def test_pairs_of_one_prompt_are_one_piece_of_evidence() -> None:
    """100 prompts of ten like pairs: the interval of 100 prompts of one pair each, not that of 1,000 pairs."""
    right = np.random.default_rng(0).random(100) < 0.7
    scores = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
    one = reward_metrics(scores, [0] * 100).interval
    ids = [f"p{i}" for i in range(100) for _ in range(10)]
    many = reward_metrics(np.repeat(scores, 10, axis=0), [0] * 1000, prompts=ids)
    alone = reward_metrics(np.repeat(scores, 10, axis=0), [0] * 1000).interval
    assert one is not None and many.interval is not None and alone is not None
    width = lambda x: x.high - x.low  # noqa: E731
    assert (many.accuracy, many.interval.n, many.n_pairs) == (pytest.approx(one.value), 100, 1000)
    assert width(many.interval) == pytest.approx(width(one))
    assert width(alone) < 0.4 * width(one)


def test_prompts_of_many_pairs_weigh_by_their_pairs() -> None:
    """Three wins of one prompt and a loss of another: 3 of 4 right, as without prompts, of two pieces of evidence."""
    found = reward_metrics([[1, 0]] * 3 + [[0, 1]], [0] * 4, prompts=["a", "a", "a", "b"])
    assert found.accuracy == pytest.approx(0.75)
    assert found.interval is not None and (found.interval.n, found.interval.high) == (2, 1.0)


def test_nothing_but_ties_has_no_ranking_accuracy() -> None:
    found = reward_metrics([[3, 1]], [0], [True])
    assert found.accuracy is None and found.interval is None and found.accuracy_tied == 1 and found.bins == []


def test_reward_metrics_do_not_depend_on_the_order_within_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, label, flip = rng.standard_normal((50, 2)), rng.integers(0, 2, 50), rng.integers(0, 2, 50).astype(bool)
    turned = np.where(flip[:, None], scores[:, ::-1], scores)
    assert reward_metrics(turned, np.where(flip, 1 - label, label)) == reward_metrics(scores, label)


def test_cost_metrics_by_hand() -> None:
    # the unsafer response costs more in pairs 0 and 1, not in 2
    found = cost_metrics([[-1, 2], [1, 0], [-2, 3]], safer=[0, 1, 1], unsafe=[[0, 1], [1, 0], [1, 0]])
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.interval is not None and found.interval.value == found.accuracy
    assert found.sign_accuracy == pytest.approx(4 / 6)  # both responses of the last pair are on the wrong side
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.auc == pytest.approx(4 / 9)  # unsafe 2, 1, -2 above safe -1, 0, 3: 2 + 2 + 0 pairs of 9
    assert found.ece is not None and sum(b.count for b in found.bins) == 6


def test_cost_metrics_need_a_label_per_response() -> None:
    with pytest.raises(ValueError, match="one label per response"):
        cost_metrics([[1, 2]], [0], [True])
