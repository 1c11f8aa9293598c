"""Ranking, signs and AUC against hand-derived values and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v import statistics as s


def test_ranking_accuracy() -> None:
    # right, wrong, tie: (1 + 0 + 1/2) / 3
    assert s.ranked([[2, 1], [0, 3], [1, 1]], [0, 0, 1]).accuracy == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"expected \(N, 2\)"):
        s.ranked([1, 2], [0, 1])


def test_labels_that_were_forced_stand_apart() -> None:
    found = s.ranked([[2, 1], [0, 3], [1, 1]], [0, 0, 1], [False, True, False])
    assert (found.accuracy, found.accuracy_tied, found.pairs, found.pairs_tied) == (0.75, 0.0, 2, 1)
    assert s.ranked([[2, 1]], [0], [True]).accuracy is None  # a share of no pairs is unknown, not 0


def test_sign_accuracy_counts_zero_as_safe() -> None:
    assert s.sign_accuracy([1, -1, 0, 2], [True, True, False, False]) == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20))
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    up, down = [x for x, y in rows if y], [x for x, y in rows if not y]
    found = s.auc([x for x, _ in rows], [y for _, y in rows])
    if not up or not down:
        assert found is None
    else:
        assert found == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a in up for b in down]))


def test_balanced_accuracy() -> None:
    # recall of the positives 1/2, of the negatives 1
    assert s.balanced_accuracy([1, 0, 0, 0, 0], [1, 1, 0, 0, 0]) == 0.75
    assert s.balanced_accuracy([1, 0], [1, 1]) is None
