"""Means over seeds and prompts: hand-derived values, limiting cases, and coverage where seeds differ."""

import numpy as np
import pytest
from scipy import stats

from safe_rlhf_v.comparison.crossed import crossed, half_width, holm, variances
from safe_rlhf_v.statistics import wilson


def test_crossed_by_hand() -> None:
    """y = [[1, 2, 3], [3, 4, 8]]: seed means 2 and 5, prompt means 2, 3, 5.5, mean 3.5.

    var(seed means) = 4.5, over S = 2: 2.25. var(prompt means) = (2.25 + 0.25 + 4)/2 = 3.25, over P = 3: 1.08333.
    Residuals y - seed - prompt + mean: [1-2-2+3.5, 2-2-3+3.5, 3-2-5.5+3.5] = [.5, .5, -1], negated in row two; sum of
    squares 3, over (S-1)(P-1) = 2: 1.5, over S P = 6: 0.25. v_S = 2.25 with 1 degree, v_P = 1.08333 - 0.25 with 2.
    Half the interval: sqrt(12.7062^2 * 2.25 + 4.30265^2 * 0.83333) = 19.460.
    """
    found = crossed(np.array([[1.0, 2, 3], [3, 4, 8]]))
    assert found.value == pytest.approx(3.5)
    assert found.low == pytest.approx(3.5 - 19.460, abs=1e-3)
    assert found.high == pytest.approx(3.5 + 19.460, abs=1e-3)
    t = stats.t.isf((found.p or 0) / 2, [1, 2])
    assert t[0] ** 2 * 2.25 + t[1] ** 2 * 0.83333 == pytest.approx(3.5**2, rel=1e-4)
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


ERRS = {0.05: 0.01, 0.05 / 13: 0.0021}  # level: 2.9 standard errors of a share of 4,000 and more


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("of_seeds", [0.0, 0.05, 0.1, 0.2, 0.5, 3.0])
def test_level_and_coverage_hold_whatever_the_seeds_do(seeds: int, of_seeds: float) -> None:
    """Tables of true mean 0, standard deviations of prompts 1, of cells .5 and of seeds from none to large.

    An interval of level 1 - alpha misses 0 in at most alpha of them: alone, and at .05/13, the first step of Holm's
    thirteen. Satterthwaite's t misses .015 to .02 at .05/13 with three seeds that differ by .2.
    """
    rng, count, prompts = np.random.default_rng(seeds), 4000, 40
    y = rng.normal(0, 0.5, (count, seeds, prompts)) + rng.normal(0, 1, (count, 1, prompts))
    y += rng.normal(0, of_seeds, (count, seeds, 1))
    means = np.abs(y.mean((1, 2)))
    for alpha, error in ERRS.items():
        missed = float((means > half_width(variances(y), y.shape[1:], alpha)).mean())
        assert missed <= alpha + error, (alpha, missed)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_level_holds_for_rare_events(seeds: int) -> None:
    """Shares of 4 answers a prompt, in the mean 2 %: whole tables come out with equal seeds by chance."""
    rng = np.random.default_rng(seeds)
    rates = rng.beta(0.1, 4.9, (3000, 1, 100)) * rng.gamma(4, 1 / 4, (3000, seeds, 1))  # mean .02
    y = rng.binomial(4, np.minimum(rates, 1)) / 4
    y = y - rng.permuted(y, axis=0)  # two methods alike
    misses = np.abs(y.mean((1, 2))) > half_width(variances(y), y.shape[1:], 0.05 / 13)
    assert misses.mean() <= 0.05 / 13 + 0.0035


@pytest.mark.parametrize("of_seeds", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_thirteen_claims_seldom_give_one_false_verdict(seeds: int, of_seeds: float) -> None:
    """Pages of thirteen claims of which none is right: Holm finds one where the smallest p is at most .05/13.

    At most one page in twenty, within 2.9 standard errors of a share of 1,500. By Satterthwaite's t .24 of the pages.
    """
    rng, shape = np.random.default_rng(seeds), (1500, 13, seeds, 20)
    y = rng.normal(0, 0.5, shape) + rng.normal(0, 1, (1500, 13, 1, 20)) + rng.normal(0, of_seeds, (1500, 13, seeds, 1))
    found = np.abs(y.mean((2, 3))) > half_width(variances(y), shape[2:], 0.05 / 13)
    assert found.any(1).mean() <= 0.05 + 0.0163
    tables, wanted = y[:4].reshape(-1, seeds, 20), found[:4].reshape(-1)
    assert [(crossed(t).p or 0.0) <= 0.05 / 13 for t in tables] == wanted.tolist()


def test_power_is_kept_where_prompts_are_what_varies() -> None:
    """Seeds alike, three of them, an effect of 6 standard errors: found nearly always; t of 2 degrees finds .66."""
    rng, (seeds, prompts) = np.random.default_rng(0), (3, 100)
    y = 0.6 + rng.normal(0, 1, (500, 1, prompts)) + rng.normal(0, 0.2, (500, seeds, prompts))
    assert (np.abs(y.mean((1, 2))) > half_width(variances(y), (seeds, prompts), 0.05)).mean() > 0.95


def test_seeds_that_agree_by_luck_do_not_hide_what_varies() -> None:
    """Equal seed means and equal prompt means of cells that differ: the cells' own variance is left: squares of .5 sum
    to 1, over one degree and four cells."""
    of_seeds, of_prompts = variances(np.array([[1.0, 0], [0, 1]]))
    assert (float(of_seeds), float(of_prompts)) == (0.0, pytest.approx(0.25))


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
