"""Every multiplier rule and every on-policy algorithm on problems whose solution is known, to 1e-2.

docs/methods.md, "What each on-policy method converges to", says in words what is held here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, fsolve, minimize
from tabular import Problem, Table, counts_of, multiplier_of, random_problem, train

from safe_rlhf_v.algorithms.crpo import CRPO
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.p3o import P3O
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.algorithms.rloo_lag import RLOOLag
from safe_rlhf_v.constraint import BoundWatch
from safe_rlhf_v.cost_measures import CVaR, HighConfidence
from safe_rlhf_v.duals import AdditiveDual, AugmentedDual, LogDual, PIDDual, bound, fixed

CLOSE = 1e-2
RULES = [
    LogDual(lr=0.5, initial=1.0, maximum=20.0),
    AdditiveDual(lr=0.5, initial=1.0, maximum=20.0),
    AugmentedDual(lr=0.3, rho=0.3, initial=1.0, maximum=20.0),
    PIDDual(kp=0.3, ki=0.3, kd=0.1, smoothing=0.5, initial=1.0, maximum=20.0),
]
rules = pytest.mark.parametrize("dual", RULES, ids=lambda dual: type(dual).__name__)
seeds = st.integers(0, 10_000)
multipliers = st.floats(0.4, 2.0)


def few(examples: int) -> Callable[[Any], Any]:
    """A fixed set of random problems: what is proven on a machine is proven on another."""
    return lambda test: seed(0)(settings(max_examples=examples, deadline=None, derandomize=True)(test))


def assert_policy(got: Table, want: Table) -> None:
    assert np.abs(got - want).max() < CLOSE


# --------------------------------------------------------------------------- the closed form itself


@few(5)
@given(seeds, multipliers)
def test_the_closed_form_is_the_constrained_optimum(number: int, lam: float) -> None:
    """Against a general solver that knows nothing of multipliers."""
    problem = random_problem(number, prompts=1)
    threshold = problem.cost(problem.optimum(lam))

    def loss(pi: Table) -> float:
        return -float(pi @ problem.rewards[0] - problem.beta * pi @ np.log(pi / problem.reference[0]))

    constraints = [
        {"type": "eq", "fun": lambda pi: pi.sum() - 1},
        {"type": "ineq", "fun": lambda pi: threshold - pi @ problem.costs[0]},
    ]
    found = minimize(loss, problem.reference[0], bounds=[(1e-9, 1)] * 4, constraints=constraints, tol=1e-10)
    assert found.success
    assert_policy(found.x, problem.optimum(multiplier_of(problem, threshold, problem.optimum))[0])


# --------------------------------------------------------------------------- rules, inner problem solved exactly


def settle(dual: Any, problem: Problem, threshold: float, steps: int = 2000) -> tuple[float, int]:
    """The multiplier after steps on the exact maximiser's violation, and how often it was reported at its bound."""
    state, watch, warned = dual.init(), BoundWatch(bound(dual), patience=50), 0
    for step in range(steps):
        violation = problem.cost(problem.optimum(state.value)) - threshold
        state = dual.step(state, violation)
        watch.see(state.value, violation, step)
        warned += watch.steps == 50
    return state.value, warned


@rules
@few(15)
@given(number=seeds, lam=multipliers)
def test_rules_reach_the_multiplier(dual: Any, number: int, lam: float) -> None:
    problem = random_problem(number)
    threshold = problem.cost(problem.optimum(lam))
    want = multiplier_of(problem, threshold, problem.optimum)
    got, warned = settle(dual, problem, threshold, 500)
    assert abs(want - lam) < 1e-6 and abs(got - want) < CLOSE and not warned
    assert_policy(problem.optimum(got), problem.optimum(want))


@rules
@few(5)
@given(number=seeds, slack=st.floats(0.3, 1.0))
def test_rules_let_go_of_a_slack_constraint(dual: Any, number: int, slack: float) -> None:
    problem = random_problem(number)
    got, warned = settle(dual, problem, problem.cost(problem.optimum(0.0)) + slack)
    assert 0 <= got < CLOSE and not warned
    assert_policy(problem.optimum(got), problem.optimum(0.0))


@rules
@few(3)
@given(number=seeds, short=st.floats(0.05, 1.0))
def test_rules_stand_at_their_bound_where_the_constraint_cannot_be_met(dual: Any, number: int, short: float) -> None:
    problem = random_problem(number)
    out_of_reach = float(problem.costs.min(-1).mean()) - short
    assert settle(dual, problem, out_of_reach) == (dual.maximum, 1)


# --------------------------------------------------------------------------- algorithms that claim the optimum


@rules
@few(3)
@given(number=seeds, lam=multipliers)
def test_rloo_reaches_the_constrained_optimum(dual: Any, number: int, lam: float) -> None:
    problem = random_problem(number)
    threshold = problem.cost(problem.optimum(lam))
    got = train(problem, RLOOLag(threshold=threshold, beta=problem.beta), dual)
    assert abs(got.multiplier - lam) < CLOSE
    assert_policy(got.pi, problem.optimum(lam))


@rules
@few(3)
@given(number=seeds, lam=multipliers)
def test_ppo_lagrangian_reaches_the_optimum_for_beta_times_1_plus_lam(dual: Any, number: int, lam: float) -> None:
    problem = random_problem(number)
    threshold = problem.cost(problem.kl_in_both(lam))
    got = train(problem, PPOLag(threshold=threshold, beta=problem.beta), dual)
    assert abs(got.multiplier - lam) < CLOSE
    assert_policy(got.pi, problem.kl_in_both(lam))


@pytest.mark.parametrize("algorithm", [PPOLag, RLOOLag])
def test_slack_ends_as_ppo_on_the_reward(algorithm: Any) -> None:
    problem = random_problem(3)
    threshold = problem.cost(problem.optimum(0.0)) + 0.5
    got = train(problem, algorithm(threshold=threshold, beta=problem.beta), AdditiveDual(0.5, 1.0, 20.0), steps=100)
    assert got.multiplier == 0.0
    assert_policy(got.pi, problem.optimum(0.0))


@pytest.mark.parametrize("algorithm", [PPOLag, RLOOLag])
def test_infeasible_ends_at_the_bound(algorithm: Any) -> None:
    problem, dual = random_problem(4), AdditiveDual(0.5, 1.0, 5.0)
    family = problem.kl_in_both if algorithm is PPOLag else problem.optimum
    threshold = float(problem.costs.min(-1).mean()) - 0.1
    got = train(problem, algorithm(threshold=threshold, beta=problem.beta), dual, steps=150)
    assert got.multiplier == 5.0 and got.violations[-1] > 0
    assert_policy(got.pi, family(5.0))


def test_ppo_lagrangian_cannot_go_below_the_cost_of_ref_exp_minus_c_over_beta() -> None:
    """The KL grows with the multiplier, so a threshold that another form meets may be out of its reach."""
    problem = random_problem(5)
    least = problem.cost(problem.tilted(-problem.costs, problem.beta))
    threshold = least - 0.1
    lam = multiplier_of(problem, threshold, problem.optimum)
    assert lam < 50 and problem.cost(problem.kl_in_both(1e9)) == pytest.approx(least, abs=1e-6)
    dual = AdditiveDual(1.0, 1.0, 20.0)
    ppo = train(problem, PPOLag(threshold=threshold, beta=problem.beta), dual, steps=300)
    rloo = train(problem, RLOOLag(threshold=threshold, beta=problem.beta), dual, steps=300)
    assert ppo.multiplier == 20.0 and ppo.violations[-1] > 0
    assert abs(rloo.multiplier - lam) < CLOSE


def test_with_the_kl_in_both_a_larger_multiplier_may_raise_the_cost() -> None:
    """r = -2 c: the exponent is -c (2 + lam) / (1 + lam), so all that lam does is to bring back the reference."""
    problem = random_problem(5)
    opposed = Problem(problem.reference, -2 * problem.costs, problem.costs, problem.beta)
    costs = [opposed.cost(opposed.kl_in_both(lam)) for lam in (0.0, 1.0, 5.0)]
    assert costs == sorted(costs) and costs[0] < costs[2] - 0.1
    got = train(opposed, PPOLag(beta=opposed.beta), fixed(5.0), steps=60)
    assert_policy(got.pi, opposed.kl_in_both(5.0))
    assert opposed.cost(opposed.optimum(5.0)) < opposed.cost(opposed.optimum(0.0))


@pytest.mark.parametrize("lam", [0.0, 1.5])
def test_a_fixed_multiplier_is_reward_shaping_and_0_is_ppo(lam: float) -> None:
    problem = random_problem(6)
    got = train(problem, PPOLag(threshold=-9.0, beta=problem.beta), fixed(lam), steps=60)
    assert got.multiplier == lam
    assert_policy(got.pi, problem.kl_in_both(lam))


# --------------------------------------------------------------------------- bounds on other statistics


@few(3)
@given(seeds, st.floats(0.5, 1.5), st.floats(0.1, 0.6))
def test_high_confidence_meets_the_conditions_of_its_constraint(number: int, lam: float, kappa: float) -> None:
    """E[c] + kappa std[c] = d, and pi = ref exp((r - lam h) / beta) with h its derivative in pi at pi."""
    problem, measure = random_problem(number, prompts=1, answers=5), HighConfidence(kappa)

    def derivative(pi: Table) -> Table:
        mean = problem.cost(pi)
        sigma = np.sqrt(problem.cost(pi, (problem.costs - mean) ** 2))
        return problem.costs + kappa * (problem.costs - mean) ** 2 / (2 * sigma)

    def statistic(pi: Table) -> float:
        mean = problem.cost(pi)
        return mean + kappa * float(np.sqrt(problem.cost(pi, (problem.costs - mean) ** 2)))

    want = problem.optimum(lam)
    for _ in range(200):
        want = problem.tilted(problem.rewards - lam * derivative(want), problem.beta)
    algorithm = RLOOLag(threshold=statistic(want), beta=problem.beta)
    got = train(problem, algorithm, AdditiveDual(0.5, 1.0, 20.0), measure=measure, rows=20_000, steps=200)
    assert abs(got.multiplier - lam) < CLOSE
    assert_policy(got.pi, want)
    assert problem.cost(got.pi) < statistic(want) - 0.05 * kappa  # the mean keeps a margin


def test_cvar_holds_the_tail_and_meets_the_conditions_of_its_constraint() -> None:
    """CVaR_.5 = d, and pi = ref exp((r - lam {c - eta}^+ / .5) / beta) with eta the median."""
    problem, alpha = random_problem(2, prompts=1, answers=8), 0.5

    def tail(pi: Table) -> tuple[float, Table, float]:
        order = np.argsort(problem.costs[0])
        eta = problem.costs[0][order][np.searchsorted(pi[0][order].cumsum(), alpha - 1e-9)]
        excess = np.maximum(problem.costs - eta, 0) / (1 - alpha)
        return eta, excess, eta + problem.cost(pi, excess)

    threshold = tail(problem.optimum(0.0))[2] - 0.15
    algorithm = RLOOLag(threshold=threshold, beta=problem.beta)
    dual = AdditiveDual(0.1, 0.1, 20.0)
    got = train(problem, algorithm, dual, measure=CVaR(alpha), rows=4000, steps=400)
    _, excess, statistic = tail(got.pi)
    assert abs(statistic - threshold) < CLOSE and got.multiplier > 0.05
    assert_policy(got.pi, problem.tilted(problem.rewards - got.multiplier * excess, problem.beta))


# --------------------------------------------------------------------------- algorithms that claim something else


def penalised_forward(problem: Problem, scores: Table) -> Table:
    """beta ref / (nu - s): maximises E[s] - beta KL(ref || pi), one prompt a row."""

    def pi_of(nu: float, reference: Table, row: Table) -> Table:
        return problem.beta * reference / (nu - row)

    result = []
    for reference, row in zip(problem.reference, scores, strict=True):
        low, high = row.max() + problem.beta * reference[row.argmax()], row.max() + problem.beta
        nu = brentq(lambda x: pi_of(x, reference, row).sum() - 1, low, high)  # noqa: B023
        result.append(pi_of(nu, reference, row))
    return np.array(result)


@few(3)
@given(seeds, multipliers)
def test_the_centred_group_form_maximises_with_the_kl_of_the_reference(number: int, lam: float) -> None:
    """The gradient of k3 at samples of pi is that of KL(ref || pi): pi = beta ref / (nu - (r - lam c) / (1 + lam))."""
    problem = random_problem(number)

    def family(x: float) -> Table:
        return penalised_forward(problem, (problem.rewards - x * problem.costs) / (1 + x))

    threshold = problem.cost(family(lam))
    algorithm = GroupLag(threshold=threshold, beta=problem.beta, scale=False)
    got = train(problem, algorithm, AdditiveDual(0.5, 1.0, 20.0), rate=0.3, steps=400)
    assert abs(got.multiplier - lam) < CLOSE
    assert_policy(got.pi, family(lam))
    other = problem.kl_in_both(lam)  # what the KL of the policy to the reference would give
    assert np.abs(got.pi - family(lam)).max() < np.abs(got.pi - other).max()


def test_the_scaled_group_form_does_so_with_standardised_scores() -> None:
    problem, lam = random_problem(7, prompts=1), 1.2

    def deviations(pi: Table) -> tuple[float, float]:
        tables = (problem.rewards, problem.costs)
        return tuple(float(np.sqrt(problem.cost(pi, (t - problem.cost(pi, t)) ** 2))) for t in tables)  # type: ignore[return-value]

    def policy(sigma: Table) -> Table:
        scores = (problem.rewards / sigma[0] - lam * problem.costs / sigma[1]) / (1 + lam)
        return penalised_forward(problem, scores)

    sigma = fsolve(lambda x: np.array(deviations(policy(x))) - x, [1.0, 1.0])
    got = train(problem, GroupLag(beta=problem.beta), fixed(lam), rate=0.3)
    assert_policy(got.pi, policy(sigma))


@few(2)
@given(seeds, multipliers)
def test_crpo_hovers_about_the_solution_of_ppo_lagrangian(number: int, lam: float) -> None:
    """A share s of cost steps acts as the multiplier s / (1 - s); the bound is that for d + tolerance."""
    problem, tolerance = random_problem(number), 0.1
    threshold = problem.cost(problem.kl_in_both(lam)) - tolerance
    algorithm = CRPO(threshold=threshold, tolerance=tolerance, beta=problem.beta)
    got = train(problem, algorithm, fixed(0.0), rate=0.03, steps=400)
    assert_policy(got.mean_pi, problem.kl_in_both(lam))
    share = float(np.mean(np.array(got.violations[200:]) > tolerance))
    assert share / (1 - share) == pytest.approx(lam, abs=0.15)  # a share of 200 steps


@few(2)
@given(seeds, multipliers)
def test_p3o_is_exact_above_the_multiplier(number: int, lam: float) -> None:
    problem = random_problem(number)
    threshold = problem.cost(problem.optimum(lam))
    algorithm = P3O(threshold=threshold, beta=problem.beta, kappa=lam + 1)
    got = train(problem, algorithm, fixed(0.0), rate=0.02, steps=400)
    assert_policy(got.mean_pi, problem.optimum(lam))


@few(3)
@given(seeds, multipliers)
def test_p3o_below_the_multiplier_is_shaping_with_kappa_and_misses_the_bound(number: int, lam: float) -> None:
    problem = random_problem(number)
    threshold = problem.cost(problem.optimum(lam))
    got = train(problem, P3O(threshold=threshold, beta=problem.beta, kappa=0.5 * lam), fixed(0.0), steps=100)
    assert_policy(got.pi, problem.optimum(0.5 * lam))
    assert got.violations[-1] > 0


@few(3)
@given(seeds, multipliers)
def test_rectified_repo_with_slack_bounds_the_mean_of_positive_costs(number: int, lam: float) -> None:
    problem = random_problem(number)
    positive = Problem(problem.reference, problem.rewards, np.maximum(problem.costs, 0), problem.beta)
    slack = positive.cost(positive.kl_in_both(lam))
    got = train(
        problem, RePO(form="rectified", slack=slack, beta=problem.beta), AdditiveDual(0.5, 1.0, 20.0), steps=400
    )
    assert abs(got.multiplier - multiplier_of(positive, slack, positive.kl_in_both)) < CLOSE
    assert_policy(got.pi, positive.kl_in_both(lam))


def test_per_prompt_repo_lets_the_answers_of_a_prompt_pay_and_no_other_prompt() -> None:
    """max E[r] - beta (1 + lam) KL - lam mean {E_y[c | x] + m}^+: each prompt ends at its own multiplier in 0..lam,
    0 where its mean holds without, lam where even that is not enough, and between them exactly on -m."""
    problem, lam, margin = random_problem(24, prompts=8), 0.5, 0.1
    algorithm = RePO(form="per_prompt", margin=margin, beta=problem.beta)
    got = train(problem, algorithm, fixed(lam), steps=400, rate=0.05)
    free, full = problem.tilted(problem.rewards, problem.beta * (1 + lam)), problem.kl_in_both(lam)
    of = lambda pi: (pi * problem.costs).sum(-1)  # noqa: E731
    kinds = np.select([of(free) < -margin, of(full) > -margin], [0, 1], 2)
    assert set(kinds.tolist()) == {0, 1, 2}
    assert_policy(got.pi[kinds == 0], free[kinds == 0])
    assert_policy(got.pi[kinds == 1], full[kinds == 1])
    assert np.abs(of(got.mean_pi)[kinds == 2] + margin).max() < 2 * CLOSE  # it steps to and fro over the kink


def test_repo_rectified_and_per_prompt_are_ppo_lagrangian_where_every_answer_is_unsafe() -> None:
    problem = random_problem(8)
    unsafe = Problem(problem.reference, problem.rewards, problem.costs - problem.costs.min() + 0.1, problem.beta)
    for form in ("rectified", "gated", "per_prompt"):
        got = train(unsafe, RePO(form=form, beta=unsafe.beta), fixed(1.5), steps=80)  # type: ignore[arg-type]
        assert_policy(got.pi, unsafe.kl_in_both(1.5))


def test_repo_without_slack_ends_at_its_bound() -> None:
    problem, dual = random_problem(9, prompts=1), AdditiveDual(0.5, 0.0, 3.0)
    positive = Problem(problem.reference, problem.rewards, np.maximum(problem.costs + 0.2, 0), problem.beta)
    got = train(problem, RePO(margin=0.2, beta=problem.beta), dual, steps=150)
    assert got.multiplier == 3.0
    assert_policy(got.pi, positive.kl_in_both(3.0))


def test_repo_where_every_answer_is_safe() -> None:
    """Rectified: the multiplier divides the reward and not the KL. Gated: it divides both."""
    problem = random_problem(8)
    safe = Problem(problem.reference, problem.rewards, problem.costs - problem.costs.max() - 0.1, problem.beta)
    rectified = train(safe, RePO(beta=safe.beta), fixed(1.5), steps=80)
    gated = train(safe, RePO(form="gated", beta=safe.beta), fixed(1.5), steps=80)
    assert_policy(rectified.pi, safe.tilted(safe.rewards, safe.beta * 2.5))
    assert_policy(gated.pi, safe.optimum(0.0))


def test_repo_leaves_less_unsafe_mass_than_a_bound_on_the_mean() -> None:
    """At equal mean cost: the mean lets safe answers pay for the unsafe ones, the rectified cost does not."""
    problem = random_problem(9, prompts=1)
    positive = Problem(problem.reference, problem.rewards, np.maximum(problem.costs, 0), problem.beta)
    rectified = positive.optimum(3.0)
    mean = problem.optimum(multiplier_of(problem, problem.cost(rectified), problem.optimum))
    assert problem.cost(mean) == pytest.approx(problem.cost(rectified))
    assert positive.cost(rectified) < positive.cost(mean)


# --------------------------------------------------------------------------- the toolbox


def test_counts_stand_in_proportion_and_every_answer_has_one() -> None:
    # .26 of 10 is 2.6, .74 is 7.4: the larger remainder gets the tenth; an answer of probability 0 takes from the most
    assert counts_of(np.array([[0.26, 0.74], [0.0, 1.0]]), 10).tolist() == [[3, 7], [1, 9]]
