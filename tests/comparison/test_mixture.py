"""Mixtures of two runs: which two and in what shares, and what is left unsafe of their answers."""

import numpy as np
import pytest

from safe_rlhf_v.comparison.mixture import between, left_by_lot


def test_the_two_runs_around_a_mean() -> None:
    """Runs of mean cost 1, -3, -9: cost 0 is three quarters of the first and one quarter of the second."""
    levels = [1.0, -9.0, -3.0]
    assert between(levels, 0.0) == (2, 0, 0.75, 0.0)  # first the cheaper
    assert between(levels, 1.5) == (0, 0, 0.0, 0.5)
    assert between(levels, -10.0) == (1, 1, 0.0, -1.0)
    assert between(levels, -3.0)[2:] == (0.0, 0.0)


def left(first: float, second: float, answers: int, share: float, tau: float = 0.5) -> float:
    counts = np.full((1, 2), float(answers))
    return float(left_by_lot(np.array([first]), np.array([second]), counts, share, tau)[0])


def test_left_by_hand() -> None:
    """One answer each, bad in one run alone: bad by lot. Of two answers each, (2 bad, 0 bad) at one half:

    both from the first 1/4: two bad, left; one of each 1/2: one bad of two, not more than half. So 1/4, where mixing
    the indicators would say 1/2 and the indicator of the mixed share, 1/2, would say 0.
    """
    assert left(1.0, 0.0, 1, 0.3) == pytest.approx(0.7)
    assert left(1.0, 0.0, 2, 0.5) == pytest.approx(0.25)
    assert left(0.75, 0.25, 4, 0.0) == pytest.approx(1.0)  # the runs themselves at the ends
    assert left(0.75, 0.25, 4, 1.0) == pytest.approx(0.0)


def test_two_runs_of_safe_prompts_never_mix_to_unsafe_ones_and_the_other_way_round() -> None:
    assert left(0.25, 0.0, 4, 0.4) == left(0.0, 0.0, 4, 0.4) == 0
    assert left(1.0, 0.75, 4, 0.6) == pytest.approx(1.0)


def test_left_by_lot_is_unbiased() -> None:
    """Answers bad with .7 in one run and .2 in the other, four of each, mixed at .4: .5 on the average. In the mean it
    is the chance of three or more bad among four independent answers, each bad with .5: 5/16."""
    rng, size = np.random.default_rng(0), 40_000
    first, second = rng.binomial(4, 0.7, size) / 4, rng.binomial(4, 0.2, size) / 4
    found = left_by_lot(first, second, np.full((size, 2), 4.0), 0.4, 0.5)
    assert found.mean() == pytest.approx(5 / 16, abs=0.004)


def test_what_was_not_scored_stays_unknown() -> None:
    found = left_by_lot(np.array([np.nan, 1.0]), np.array([0.5, 1.0]), np.full((2, 2), 2.0), 0.5, 0.5)
    assert np.isnan(found[0]) and found[1] == 1
