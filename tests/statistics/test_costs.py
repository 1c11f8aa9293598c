"""CVaR and compensation statistics by hand. c > 0 is unsafe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v import statistics as s


def test_cvar_by_hand() -> None:
    costs = np.arange(1.0, 11.0)
    assert s.cvar(costs, 0.8) == pytest.approx(9.5)  # mean of 9 and 10
    assert s.cvar(costs, 0.85) == pytest.approx(14.5 / 1.5)  # 10 whole, 9 by half
    assert s.cvar(costs, 0.0) == pytest.approx(5.5)  # the mean


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0, 0.99))
def test_cvar_is_the_minimum_over_eta(costs: list[float], alpha: float) -> None:
    brute = min(eta + np.maximum(np.array(costs) - eta, 0).mean() / (1 - alpha) for eta in costs)
    assert s.cvar(costs, alpha) == pytest.approx(brute, abs=1e-9)


def test_cvar_refuses_alpha_one() -> None:
    with pytest.raises(ValueError, match="alpha 1"):
        s.cvar([1.0], 1.0)


def test_compensation_by_hand() -> None:
    found = s.compensation([2, -1, -3, 0], ["a", "a", "b", "b"], alpha=0.75, tau=0.4)
    assert found.mean == -0.5  # (2 - 1 - 3) / 4
    assert found.mean_positive == 0.5 and found.mean_negative == 1.0
    assert found.mean == found.mean_positive - found.mean_negative
    assert found.compensated_mass == 0.5
    assert found.unsafe_share == 0.25  # cost 0 is safe
    assert found.cvar == 2.0
    assert found.share_above_tau == 0.5  # P(c > 0 | a) = 1/2 > .4, P(c > 0 | b) = 0
    assert s.compensation([2, -1, -3, 0], ["a", "a", "b", "b"], tau=0.5).share_above_tau == 0.0  # strictly above
    assert (found.n_answers, found.n_prompts) == (4, 2)
