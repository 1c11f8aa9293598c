"""Means over seeds and prompts: hand-derived values, limiting cases, and coverage where seeds differ."""

import numpy as np
import pytest
from scipy import stats

from safe_rlhf_v.evaluation.crossed import at_equal_cost, crossed, holm
from safe_rlhf_v.evaluation.statistics import wilson


def test_crossed_by_hand() -> None:
    """y = [[1, 2, 3], [3, 4, 8]]: seed means 2 and 5, prompt means 2, 3, 5.5, mean 3.5.

    var(seed means) = 4.5, over S = 2: 2.25. var(prompt means) = (2.25 + 0.25 + 4)/2 = 3.25, over P = 3: 1.08333.
    Residuals y - seed - prompt + mean: [1-2-2+3.5, 2-2-3+3.5, 3-2-5.5+3.5] = [.5, .5, -1], negated in row two; sum of
    squares 3, over (S-1)(P-1) = 2: 1.5, over S P = 6: 0.25. Variance 2.25 + 1.08333 - 0.25 = 3.08333.
    Degrees: 3.08333^2 / (2.25^2/1 + 1.08333^2/2 + 0.25^2/2) = 9.50694 / (5.0625 + 0.58681 + 0.03125) = 1.67361.
    """
    found = crossed(np.array([[1.0, 2, 3], [3, 4, 8]]))
    half = stats.t.ppf(0.975, 1.67361) * 3.08333**0.5
    assert found.value == pytest.approx(3.5)
    assert found.low == pytest.approx(3.5 - half, rel=1e-4)
    assert found.high == pytest.approx(3.5 + half, rel=1e-4)
    assert found.p == pytest.approx(2 * stats.t.sf(3.5 / 3.08333**0.5, 1.67361), rel=1e-4)
    assert (found.seeds, found.prompts) == (2, 3)


def test_one_seed_is_the_t_test_over_prompts() -> None:
    y = np.array([0.1, 0.7, 0.3, 0.9, 0.2])
    found, wanted = crossed(y[None]), stats.ttest_1samp(y, 0)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, wanted.pvalue))


def test_prompts_that_agree_leave_the_t_test_over_seeds() -> None:
    seeds = np.array([0.1, 0.4, 0.3])
    found, wanted = crossed(np.tile(seeds[:, None], (1, 50))), stats.ttest_1samp(seeds, 0)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, wanted.pvalue))


def test_many_prompts_do_not_make_up_for_seeds_that_differ() -> None:
    """Seeds differ by 1 and prompts by nothing much: the interval stays as wide however many prompts there are."""
    rng = np.random.default_rng(0)
    widths = []
    for prompts in (50, 5000):
        y = np.array([0.0, 1.0, 2.0])[:, None] + rng.normal(0, 0.1, (3, prompts))
        found = crossed(y)
        widths.append((found.high or 0) - (found.low or 0))
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert widths[1] > 4


def test_intervals_cover() -> None:
    """95 % intervals of a mean of 0 cover it in about 95 % of tables, where seeds, prompts and cells all vary."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        y = rng.normal(0, 0.5, (4, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 1, (4, 30))
        found = crossed(y)
        hits += (found.low or 0) <= 0 <= (found.high or 0)
    assert 0.93 <= hits / 1000 <= 0.985


def test_equal_entries_give_wilson_or_nothing() -> None:
    nothing = crossed(np.zeros((3, 20)))
    assert (nothing.low, nothing.high, nothing.p) == (None, None, None)
    share = crossed(np.zeros((3, 20)), bounds=(0, 1))
    assert (share.low, share.high) == pytest.approx(wilson(0, 20))
    assert crossed(np.ones((3, 20)), bounds=(0, 1)).low == pytest.approx(wilson(20, 20)[0])


def test_bounds_cut_the_interval() -> None:
    y = np.array([[0.0, 0, 0, 1], [0, 0, 0, 0]])
    assert (crossed(y).low or 0) < 0
    assert crossed(y, bounds=(0, 1)).low == 0


def test_holm_by_hand() -> None:
    """Sorted .01, .02, .04, .3 times 4, 3, 2, 1: .04, .06, .08, .3; none below the one before."""
    assert holm([0.04, 0.01, 0.3, 0.02]) == pytest.approx([0.08, 0.04, 0.3, 0.06])
    assert holm([0.02, 0.03]) == pytest.approx([0.04, 0.04])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_at_equal_cost_is_a_mixture_of_the_neighbours() -> None:
    """Runs of mean cost 1 and -3: cost 0 is three quarters of the first and one quarter of the second."""
    costs, tables = [1.0, -3.0, -9.0], [np.array([1.0, 0]), np.array([0.2, 0.4]), np.array([0.0, 0])]
    mixed, out = at_equal_cost(costs, tables, 0.0)
    assert mixed == pytest.approx([0.8, 0.1])
    assert out == 0
    above, out = at_equal_cost(costs, tables, 1.5)
    assert (above.tolist(), out) == ([1, 0], 0.5)
    below, out = at_equal_cost(costs, tables, -10.0)
    assert (below.tolist(), out) == ([0, 0], -1.0)
