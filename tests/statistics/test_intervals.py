"""Estimates and intervals against hand-derived values, brute force and simulation. c > 0 is unsafe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v import statistics as s

FAST = s.Resampling(draws=400)


def test_wilson_by_hand() -> None:
    # 5 of 10: z^2 = 3.8415; centre 1/2; half = 1.95996 / 1.38415 * sqrt(.025 + 3.8415 / 400) = .26341
    assert s.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    # 0 of 10: upper = z^2 / (10 + z^2) = 3.8415 / 13.8415; 10 of 10 mirrors it
    assert s.wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert s.wilson(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="successes 3 of n 2"):
        s.wilson(3, 2)


def test_a_prompt_weighs_the_same_however_often_it_is_sampled() -> None:
    # a: (1 + 1 + 1) / 3 = 1, b: 0; the mean over prompts is 1/2, over answers it would be 3/4
    assert s.mean_interval([1, 1, 1, 0], ["a", "a", "a", "b"]).value == 0.5


def test_repeating_every_answer_brings_no_evidence() -> None:
    values = np.random.default_rng(0).standard_normal(40)
    once = s.mean_interval(values, list(range(40)))
    thrice = s.mean_interval(np.repeat(values, 3), [i for i in range(40) for _ in range(3)])
    assert thrice.n == once.n == 40
    assert (thrice.value, thrice.low, thrice.high) == pytest.approx((once.value, once.low, once.high))


def test_bootstrap_has_the_exact_resampling_distribution() -> None:
    # all 3^3 resamples of (0, 1, 5): mean 2, variance var / n = (14/3) / 3
    values = np.array([0.0, 1.0, 5.0])
    exact = np.array([np.mean(r) for r in itertools.product(values, repeat=3)])
    drawn = s.bootstrap_means(values, s.Resampling(draws=40_000))
    assert exact.mean() == 2 and exact.var() == pytest.approx(14 / 9)
    assert drawn.mean() == pytest.approx(2, abs=0.03) and drawn.var() == pytest.approx(14 / 9, abs=0.05)
    for share in (0.1, 0.5, 0.9):
        assert (drawn <= np.quantile(exact, share)).mean() == pytest.approx(
            (exact <= np.quantile(exact, share)).mean(), abs=0.02
        )


def test_bootstrap_in_chunks_draws_as_many() -> None:
    assert s.bootstrap_means(np.zeros(30_000), s.Resampling(draws=150)).shape == (150,)


def test_counts_are_those_of_whole_prompts() -> None:
    prompts = ["a", "a", "b", "c", "c", "c"]
    counts = np.concatenate(list(s.bootstrap_counts(prompts, s.Resampling(draws=2000))))
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 3] == counts[:, 5]).all()
    each = counts[:, [0, 2, 3]]
    assert (each.sum(1) == 3).all() and each.mean(0) == pytest.approx([1, 1, 1], abs=0.07)
    assert each.var(0) == pytest.approx([2 / 3] * 3, abs=0.07)  # binomial: n p (1 - p) = 3 * 1/3 * 2/3


def test_counts_and_means_are_of_the_same_resamples() -> None:
    values = np.random.default_rng(2).standard_normal(7)
    counts = np.concatenate(list(s.bootstrap_counts(range(7), FAST)))
    assert counts @ values / 7 == pytest.approx(s.bootstrap_means(values, FAST))


def test_resamples_that_agree_leave_room_only_within_bounds() -> None:
    same = np.ones(50)
    assert s.bootstrap_interval(1.0, same, 10, bounds=(0, 1)).low == pytest.approx(1 - 0.277533, abs=1e-6)
    assert s.bootstrap_interval(1.0, same, 10).low is None


def test_shares_of_rows_weigh_a_prompt_by_its_rows() -> None:
    found = s.share_of_rows([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert found.value == pytest.approx(0.75) and (found.n, found.high) == (2, 1.0)
    assert s.share_of_rows([1, 1, 0, 0], ["a", "a", "b", "b"]) == s.proportion_interval([1, 0])
    assert s.share_of_rows([1, 0, 0]) == s.proportion_interval([1, 0, 0])


def test_the_interval_of_a_share_of_rows_covers() -> None:
    """50 prompts of one to six rows that agree, 30 % true: the share of rows is a ratio of two sums."""
    rng, covered = np.random.default_rng(11), 0
    for _ in range(200):
        size, flags = rng.integers(1, 7, 50), rng.random(50) < 0.3
        ids = np.repeat(np.arange(50), size).tolist()
        found = s.share_of_rows(np.repeat(flags, size), ids, resampling=FAST)
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 198


def test_interval_by_prompt_covers_and_by_answer_does_not() -> None:
    # 25 prompts, 6 samples each, nearly all variance between prompts: true mean 0
    rng, hits, naive = np.random.default_rng(3), 0, 0
    for _ in range(200):
        values = (rng.standard_normal((25, 1)) + 0.2 * rng.standard_normal((25, 6))).ravel()
        prompts = np.repeat(np.arange(25), 6).tolist()
        right, wrong = s.mean_interval(values, prompts, resampling=FAST), s.mean_interval(values, resampling=FAST)
        hits += right.low <= 0 <= right.high
        naive += wrong.low <= 0 <= wrong.high
    assert 0.91 <= hits / 200 <= 0.99
    assert naive / 200 < 0.7


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(1).standard_normal(30)
    assert s.mean_interval(values) == s.mean_interval(values)
    assert s.mean_interval(values) != s.mean_interval(values, resampling=s.Resampling(seed=1))


def test_interval_widens_with_its_level() -> None:
    values = np.random.default_rng(1).standard_normal(30)
    narrow, wide = (s.mean_interval(values, resampling=s.Resampling(level=level)) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_equal_values_leave_room_for_the_unseen() -> None:
    # 10 prompts all rated 3 of 0..3: up to .277533 of unseen prompts may be anything: 3 - .277533 * 3
    assert s.mean_interval([3.0] * 10, bounds=(0, 3)) == s.Interval(
        value=3.0, low=pytest.approx(2.1674, abs=1e-4), high=3.0, n=10
    )
    unbounded = s.mean_interval([3.0] * 10)
    assert unbounded.low is None and unbounded.high is None


def test_proportions() -> None:
    assert s.proportion_interval([0] * 10).high == pytest.approx(0.277533, abs=1e-6)
    one_each = s.proportion_interval([True] * 5 + [False] * 5)
    assert (one_each.low, one_each.high) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    # two samples a prompt, never unsafe: 5 prompts, not 10 answers: z^2 / (5 + z^2)
    clustered = s.proportion_interval([0] * 10, [i // 2 for i in range(10)])
    assert clustered.high == pytest.approx(3.841459 / 8.841459) and clustered.n == 5


@settings(deadline=None, max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4))
def test_proportion_stays_in_range(flags: list[bool], group: int) -> None:
    found = s.proportion_interval(flags, [i // group for i in range(len(flags))], resampling=FAST)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_pairing_removes_what_prompts_share() -> None:
    rng = np.random.default_rng(5)
    before = 10 * rng.standard_normal(60)
    after = before + 0.5 + 0.1 * rng.standard_normal(60)
    paired = s.paired_difference(before, after)
    assert paired.low < 0.5 < paired.high and paired.high - paired.low < 0.1
    assert s.mean_interval(before).high - s.mean_interval(before).low > 2


def test_pairing_matches_ids_not_positions() -> None:
    found = s.paired_difference([0, 1], [1, 1, 0], ["a", "b"], ["b", "b", "a"])
    assert found.value == 0.0  # a: 0 -> 0, b: 1 -> 1


def test_pairing_refuses_other_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts were answered on one side only"):
        s.paired_difference([0, 1], [0, 1], ["a", "b"], ["a", "c"])


def test_no_change_at_all_is_not_certainty() -> None:
    # 10 pairs without a change: unseen ones may change by -1 or +1 with probability up to .277533
    found = s.paired_difference([1, 0] * 5, [1, 0] * 5, bounds=(0, 1))
    assert (found.low, found.high) == pytest.approx((-0.277533, 0.277533), abs=1e-6)


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0]], [float("inf")]])
def test_bad_vectors_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        s.mean_interval(bad)


def test_one_id_per_answer() -> None:
    with pytest.raises(ValueError, match="2 entries but prompts has 1"):
        s.mean_interval([1, 2], ["a"])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="level 95"):
        s.Resampling(level=95)
