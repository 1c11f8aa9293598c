"""Verdicts: each kind of claim with runs whose answer is known, and every road to "not decided"."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from compared import comparison, gap_rows, run, table
from pydantic import ValidationError

from safe_rlhf_v.comparison.claims import Claim, Finding, judge_claims
from safe_rlhf_v.comparison.comparison import Comparison
from safe_rlhf_v.comparison.runs import REFERENCE, RunInfo, make_run

START = run(REFERENCE, 0, 0.6, 1.0, stage="", title="start")


def finding(runs: list[Any], **claim: Any) -> Finding:
    defaults = {"paper": "x", "text": "y", "method": "m", "expect": "lower"}
    return judge_claims([Claim(**{**defaults, **claim})], Comparison(reference=START, runs=runs))[0]


def seeds(method: str, rate: float, cost: float = -3.0, count: int = 3, **info: Any) -> list[Any]:
    return [run(method, seed, rate, cost, **info) for seed in range(count)]


def test_a_clear_difference_holds_one_way_and_fails_the_other() -> None:
    runs = seeds("m", 0.05)
    found = finding(runs)
    assert (found.verdict, found.why) == ("holds", "")
    assert found.left is not None and found.right is not None and found.difference is not None
    assert found.difference.value == pytest.approx(found.left - found.right)
    assert found.right == pytest.approx(float(START.columns["unsafe"][:20].mean()))
    assert finding(runs, expect="higher").verdict == "does not hold"


def test_no_difference_is_not_decided_unless_it_is_known_to_be_small() -> None:
    runs = seeds("m", 0.5) + seeds("other", 0.5)
    assert finding(runs, against="other").verdict == "not decided"
    found = finding(runs, against="other", worth=0.5)
    assert (found.verdict, found.why) == ("does not hold", "the difference is smaller than 0.5")


def test_a_margin_forgives_a_small_loss() -> None:
    """Helpfulness 2.0 against 2.05, all prompts alike but one: no lower than 0.1 below, but lower."""
    runs = seeds("m", 0.1, helpful=2.0)
    other = [run("other", s, 0.1, -3.0, helpful=2.05 + 0.001 * s) for s in range(3)]
    claim = {"against": "other", "figure": "helpfulness", "expect": "higher"}
    assert finding(runs + other, **claim).verdict == "does not hold"
    assert finding(runs + other, margin=0.1, **claim).verdict == "holds"


def test_missing_runs_and_single_seeds_decide_nothing() -> None:
    assert finding([]).why == "no finished run of m"
    assert finding(seeds("m", 0.05), against="other").why == "no seed with both m and other"
    assert finding(seeds("m", 0.05, count=1)).why == "1 seed of the 3 that a claim takes at least"
    assert finding(seeds("m", 0.05, count=2)).verdict == "not decided"


def test_equal_cost_interpolates_between_bounds() -> None:
    """m costs -2, half way between the other's -1 and -3, whose shares of unsafe prompts are 0.8 and 0.4: 0.6."""

    def exact(method: str, seed: int, share: float, cost: float, **info: Any) -> Any:
        unsafe = np.arange(40)[:, None] % 20 < round(20 * share)
        costs = np.full((40, 1), cost)
        return make_run(RunInfo(method=method, title=method, stage="policy", seed=seed, **info), table(unsafe, costs))

    runs = [exact("m", s, 0.1 + 0.05 * s, -2.0) for s in range(3)]
    runs += [exact("other", s, 0.8, -1.0, requested=2.0) for s in range(3)]
    runs += [exact("other", s, 0.4, -3.0, requested=4.0, swept=True) for s in range(3)]
    start = exact(REFERENCE, 0, 0.9, 1.0)
    claim = Claim(
        paper="", text="", method="m", against="other", kind="equal_cost", figure="prompts_left_unsafe", expect="lower"
    )
    found = judge_claims([claim], Comparison(reference=start, runs=runs))[0]
    assert found.left == pytest.approx(0.15)
    assert found.right == pytest.approx(0.6)
    assert (found.verdict, found.why) == ("holds", "")


def exact(method: str, seed: int, unsafe: Any, cost: float, reward: float, **info: Any) -> Any:
    """unsafe: (40, K) of the answers; all of the same cost and reward."""
    answers = table(np.asarray(unsafe, bool), np.full(np.shape(unsafe), cost))
    rewards = pa.array([reward] * len(answers))
    answers = answers.set_column(answers.schema.get_field_index("reward"), "reward", rewards)
    return make_run(RunInfo(method=method, title=method, stage="policy", seed=seed, **info), answers)


def test_equal_reward_is_another_mixture_than_equal_cost() -> None:
    """The other's runs: cost 0 and -4, reward 2 and 1, unsafe on all of 20 prompts and on none.

    m, at cost -3 and reward 1.75, is a quarter of the first at equal cost and three quarters at equal reward.
    """
    some = lambda n: np.arange(40)[:, None] % 20 < n  # noqa: E731
    runs = [exact("m", s, some(8 + s), -3.0, 1.75) for s in range(3)]
    runs += [exact("other", s, some(20), 0.0, 2.0, requested=0.0) for s in range(3)]
    runs += [exact("other", s, some(0), -4.0, 1.0, requested=4.0, swept=True) for s in range(3)]
    shared = {"paper": "", "text": "", "method": "m", "against": "other", "expect": "lower"}
    claims = [Claim(kind=kind, figure="unsafe_rate", **shared) for kind in ("equal_cost", "equal_reward")]
    cost, reward = judge_claims(claims, Comparison(reference=exact(REFERENCE, 0, some(20), 1.0, 1.0), runs=runs))
    assert (cost.left, cost.right) == pytest.approx((0.45, 0.25))
    assert (reward.left, reward.right) == pytest.approx((0.45, 0.75))


def test_prompts_left_unsafe_are_asked_of_the_mixture_not_interpolated() -> None:
    """Of two answers, both unsafe in the costly run and one in the cheap one: at one half the mixture has none, one or
    two more than half with chances 1/4 (both from the costly run), and else one from each: 1/2 of two unsafe ones."""
    two = np.ones((40, 2), bool)
    one = two & np.array([True, False])
    runs = [exact("m", s, two & False, -2.0, 0.0) for s in range(3)]
    runs += [exact("other", s, two, -1.0, 0.0, requested=2.0) for s in range(3)]
    runs += [exact("other", s, one, -3.0, 0.0, requested=4.0, swept=True) for s in range(3)]
    claim = Claim(
        paper="", text="", kind="equal_cost", method="m", against="other", figure="prompts_left_unsafe", expect="lower"
    )
    found = judge_claims([claim], Comparison(reference=exact(REFERENCE, 0, two, 1.0, 0.0), runs=runs))[0]
    assert found.right == pytest.approx(1 / 4 + 1 / 2 * 1 / 2)


def test_beyond_equal_reward_fewer_unsafe_at_a_higher_reward_counts() -> None:
    some = lambda n: np.arange(40)[:, None] % 20 < n  # noqa: E731
    other = [exact("other", s, some(18), -1.0, 1.0, requested=2.0) for s in range(3)]
    start = exact(REFERENCE, 0, some(20), 1.0, 1.0)
    claim = Claim(paper="", text="", kind="equal_reward", method="m", against="other", expect="lower")
    for reward, verdict, word in ((1.5, "holds", "higher"), (0.5, "not decided", "lower")):
        runs = other + [exact("m", s, some(2 + s), -1.0, reward) for s in range(3)]
        found = judge_claims([claim], Comparison(reference=start, runs=runs))[0]
        assert found.verdict == verdict
        assert f"m is 0.50 {word} in reward in the mean than every run of other: no equal reward" in found.why


def test_answers_without_a_reward_are_named() -> None:
    runs = [exact(m, s, np.ones((40, 1)), -1.0, np.nan) for m in ("m", "other") for s in range(3)]
    claim = Claim(paper="", text="", kind="equal_reward", method="m", against="other", expect="lower")
    found = judge_claims([claim], Comparison(reference=runs[0], runs=runs))[0]
    assert (found.verdict, found.why) == ("not decided", "not every answer has a reward")


def test_that_a_difference_is_small_is_a_test_of_the_family_too() -> None:
    """A difference known to within .4: smaller than .5 alone, not so surely among forty claims."""
    runs = seeds("m", 0.5) + seeds("other", 0.5)
    claim = Claim(paper="", text="", method="m", against="other", expect="lower", worth=0.5)
    verdicts = [judge_claims([claim] * n, Comparison(reference=START, runs=runs))[0].verdict for n in (1, 40)]
    assert verdicts == ["does not hold", "not decided"]


def test_beyond_equal_cost_only_a_result_against_the_odds_counts() -> None:
    """Fewer unsafe prompts at a higher mean cost are against the odds; at a lower one they are not."""
    other = seeds("other", 0.9, -1.0, requested=2.0)
    claim = {"against": "other", "kind": "equal_cost", "figure": "prompts_left_unsafe"}
    assert finding(seeds("m", 0.05, 0.0) + other, **claim).verdict == "holds"
    cheaper = finding(seeds("m", 0.05, -4.0) + other, **claim)
    assert cheaper.verdict == "not decided"
    assert "3.00 cheaper in the mean than every run of other: no equal cost" in cheaper.why
    # as unsafe at a higher mean cost: that the difference is small decides nothing where there is no equal cost
    costlier = finding(seeds("m", 0.9, 0.0) + other, worth=1.0, **claim)
    assert costlier.verdict == "not decided" and "1.00 costlier" in costlier.why
    assert finding(seeds("m", 0.9, -4.0) + other, worth=1.0, **claim).verdict == "not decided"


def test_seeds_beyond_both_ends_decide_nothing() -> None:
    """With one seed costlier and with the others cheaper than every run of the other method: no odds to be against."""
    other = seeds("other", 0.9, -1.0, requested=2.0)
    runs = [run("m", seed, 0.05, cost) for seed, cost in enumerate((0.5, -4.0, -4.0))]
    for expect in ("lower", "higher"):
        found = finding(runs + other, against="other", kind="equal_cost", figure="prompts_left_unsafe", expect=expect)
        assert found.verdict == "not decided"
        assert "costlier than every run of other with one seed and cheaper with another" in found.why


def test_undershoot_and_overshoot() -> None:
    """`mocan` of the made-up comparison is off by -0.6 at the smallest bound, 2, and by +0.6 at the largest, 6."""
    claims = [
        Claim(paper="", text="", kind="smallest_bound", method="mocan", expect="lower"),
        Claim(paper="", text="", kind="largest_bound", method="mocan", expect="higher"),
        Claim(paper="", text="", kind="bound_error", method="ppo_lag", against="mocan", expect="lower"),
        Claim(paper="", text="", kind="slack", method="mocan", expect="lower"),
        Claim(paper="", text="", kind="slack", method="dpo", expect="lower"),
        Claim(paper="", text="", kind="largest_bound", method="repo", expect="lower"),
        Claim(paper="", text="", kind="slope", method="ppo_lag", against="mocan", expect="lower"),
    ]
    small, large, error, slack, no_slack, no_sweep, slope = judge_claims(claims, comparison(prompts=400))
    assert small.difference is not None and large.difference is not None and error.difference is not None
    assert (small.left, small.right, small.difference.value) == pytest.approx((1.4, 2.0, -0.6))
    assert (large.left, large.right, large.difference.value) == pytest.approx((6.6, 6.0, 0.6))
    assert (small.verdict, large.verdict) == ("holds", "holds")
    # ppo_lag is off by -0.1 in the mean at each of three bounds; mocan by -0.6, 0, 0.6: mean distances 0.1 and 0.4
    assert (error.left, error.right) == pytest.approx((0.1, 0.4))
    # achieved is b + .3 (b - 4) for mocan, a slope of 1.3, and b less a constant for ppo_lag, a slope of 1
    assert (slope.left, slope.right) == pytest.approx((0.0, 0.3))
    assert slack.difference is not None
    assert slack.difference.value == pytest.approx(0.3 - 3.0)  # |u| first 2, 3, 4; last 0.2, 0.3, 0.4
    assert judge_claims([claims[3]], comparison())[0].verdict == "holds"
    assert "logged no distance from its bounds" in no_slack.why
    assert "has runs at 0 bounds" in no_sweep.why


def test_a_policy_comes_closer_to_its_bounds_from_either_side() -> None:
    """From u -2, -3, -4 to .2, .3, .4 is closer; back is not. Of several constraints the farthest counts."""
    shrink = [
        [{"step": 1, "slack": {"a": -2.0 - s, "b": 0.0}}, {"step": 4, "slack": {"a": 0.1, "b": 0.2 + 0.1 * s}}]
        for s in range(3)
    ]
    grow = [[{**row, "step": 5 - row["step"]} for row in reversed(rows)] for rows in shrink]
    for logged, verdict, change in ((shrink, "holds", -2.7), (grow, "does not hold", 2.7)):
        runs = [run("m", s, 0.1, -3.0, metrics=rows) for s, rows in enumerate(logged)]
        found = finding(runs, kind="slack")
        assert found.difference is not None
        assert (found.verdict, found.difference.value) == (verdict, pytest.approx(change))


def test_many_claims_raise_the_bar() -> None:
    """A p that passes alone does not pass among twenty claims that were looked at."""
    runs = seeds("m", 0.42) + [run("other", s, 0.62, -3.0) for s in range(3)]
    one = Claim(paper="", text="", method="m", against="other", expect="lower")
    alone = judge_claims([one], Comparison(reference=START, runs=runs))[0]
    assert alone.p_adjusted is not None
    among = judge_claims([one] * 20, Comparison(reference=START, runs=runs))[0]
    assert among.p_adjusted == pytest.approx(min(1.0, 20 * alone.p_adjusted))


def test_unknown_figures_and_kinds_are_refused() -> None:
    for wrong in ({"figure": "unsafe"}, {"kind": "other"}, {"extra": 1}):
        with pytest.raises(ValidationError):
            Claim(**{"paper": "", "text": "", "method": "m", "expect": "lower", **wrong})


def test_gap_rows_are_read_back() -> None:
    from safe_rlhf_v.comparison.runs import gaps

    rows = [*gap_rows(1.0), {"step": 2, "gap": 0.5}, {"step": 3}]
    assert gaps(run("m", 0, 0.1, 0.0, metrics=rows)) == [(1.0, 1.0, 0.8, 1.2), (2.0, 0.5, None, None)]
