"""Reward and cost metrics on pairs small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from safe_rlhf_v.evaluation.preference import cost_metrics, reward_metrics


def test_reward_metrics_by_hand() -> None:
    found = reward_metrics([[3, 1], [0, 2], [5, 1]], [0, 1, 1])
    assert found.accuracy == pytest.approx(2 / 3) and found.n_pairs == 3
    assert found.interval is not None and found.interval.value == pytest.approx(2 / 3)
    # confidences sigmoid(2) = .8808 right, twice, and sigmoid(4) = .9820 wrong: bins of their own
    assert found.ece == pytest.approx((2 * (1 - 0.8808) + 0.9820) / 3, abs=1e-4)
    assert found.sign_accuracy is None


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
