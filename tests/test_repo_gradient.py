"""RePO's policy gradient against that of its penalty, exactly: every answer of a table once, weighed by the policy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tabular import Problem, Table, measured, normalised, rollout_of
from torch import Tensor

from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.duals import fixed

SEEDS = range(20)


def random_table(seed: int, prompts: int = 4, answers: int = 5) -> tuple[Problem, Table]:
    """Rewards and costs that vary as they like, and a policy somewhere; no KL."""
    rng = np.random.default_rng(seed)
    shape = (prompts, answers)
    problem = Problem(np.full(shape, 1 / answers), rng.normal(0, 1, shape), rng.normal(0, 2, shape))
    return problem, normalised(rng.uniform(0.02, 1.0, shape))


def direction(algorithm: RePO, problem: Problem, pi: Table, lam: float) -> Tensor:
    """(N, K) derivative in the logits that the algorithm follows: pi (A - E A), with critics that are right."""
    rollout, _ = rollout_of(problem, np.full(pi.shape, 1 / pi.shape[1]), pi.shape[1])  # every answer once
    weights = torch.from_numpy(pi)
    rollout = measured(algorithm, rollout)
    raw = algorithm.advantages(rollout, 0.0)
    fit = lambda x: (weights * x.view(pi.shape)).sum(1, keepdim=True).expand(pi.shape).reshape(-1, 1)  # noqa: E731
    fitted = replace(rollout, reward_values=fit(raw.reward_returns), cost_values=fit(raw.cost_returns))
    advantages = algorithm.advantages(fitted, lam).policy.view(pi.shape)
    return weights * (advantages - (weights * advantages).sum(1, keepdim=True))


def of_penalty(problem: Problem, pi: Table, lam: float, margin: float, weight: float = 1.0) -> Tensor:
    """(N, K) derivative in the logits of weight E r - lam E{c + m}^+."""
    logits = torch.from_numpy(np.log(pi)).requires_grad_()
    rewards, costs = torch.from_numpy(problem.rewards), torch.from_numpy(problem.costs)
    scores = weight * rewards - lam * (costs + margin).clamp(min=0)
    (logits.softmax(1) * scores).sum().backward()
    assert logits.grad is not None
    return logits.grad


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("seed", SEEDS)
def test_rectified_is_the_gradient_of_its_penalty(seed: int) -> None:
    problem, pi = random_table(seed)
    for margin, lam in itertools.product((0.0, 0.7), (0.3, 2.0, 20.0)):
        algorithm = RePO(beta=0.0, margin=margin)
        got = direction(algorithm, problem, pi, lam)
        torch.testing.assert_close(got * (1 + lam), of_penalty(problem, pi, lam, margin))
        cost_alone = direction(algorithm, replace(problem, rewards=0 * problem.rewards), pi, lam)
        assert cosine(cost_alone, of_penalty(problem, pi, lam, margin, weight=0.0)) == pytest.approx(1.0, abs=1e-12)


def test_gated_is_not() -> None:
    found = []
    for seed in SEEDS:
        problem, pi = random_table(seed)
        cost_alone = replace(problem, rewards=0 * problem.rewards)
        got = direction(RePO(beta=0.0, form="gated"), cost_alone, pi, 2.0)
        found.append(cosine(got, of_penalty(problem, pi, 2.0, 0.0, weight=0.0)))
    assert np.mean(found) < 0.95 and min(found) < 0.9


# --------------------------------------------------------------------------- two answers


def two_answers(dr: float, unsafe: float, safe: float) -> Problem:
    """An unsafe answer and a safe one; the unsafe one earns dr more."""
    return Problem(np.array([[0.5, 0.5]]), np.array([[dr, 0.0]]), np.array([[unsafe, safe]]))


def speed(form: Any, problem: Problem, p: float, lam: float) -> float:
    """d P(unsafe) / dt under the natural gradient: p (1 - p) (A_unsafe - A_safe)."""
    step = direction(RePO(beta=0.0, form=form), problem, np.array([[p, 1 - p]]), lam)
    return float(step[0, 0])  # p (A_unsafe - E A) = p (1 - p) (A_unsafe - A_safe)


STARTS = (0.001, 0.1, 0.5, 0.9, 0.99, 0.999)


@pytest.mark.parametrize(("dr", "dc", "safe"), [(1.0, 1.0, 0.0), (2.0, 0.5, -3.0), (0.1, 4.0, -0.2)])
def test_rectified_lowers_p_unsafe_from_every_start_once_lam_dc_exceeds_dr(dr: float, dc: float, safe: float) -> None:
    # dc = {c_unsafe}+ - {c_safe}+ = c_unsafe. speed = p (1 - p) (dr - lam dc) / (1 + lam)
    for p in STARTS:
        for factor, sign in ((1.01, -1), (5.0, -1), (0.99, 1)):
            lam = factor * dr / dc
            got = speed("rectified", two_answers(dr, dc, safe), p, lam)
            assert got == pytest.approx(p * (1 - p) * (dr - lam * dc) / (1 + lam)) and np.sign(got) == sign


@pytest.mark.parametrize(("dr", "unsafe", "safe"), [(1.0, 1.0, -0.5), (2.0, 0.5, -3.0), (0.1, 4.0, -0.2)])
def test_gated_has_a_saddle_at_1_minus_dr_over_lam_dc(dr: float, unsafe: float, safe: float) -> None:
    for factor in (1.5, 4.0, 40.0):
        dc = unsafe - safe
        lam = factor * dr / dc
        saddle, problem = 1 - dr / (lam * dc), two_answers(dr, unsafe, safe)
        assert speed("gated", problem, saddle, lam) == pytest.approx(0.0, abs=1e-12)
        assert speed("gated", problem, 0.9 * saddle, lam) < 0  # below it P(unsafe) falls
        assert speed("gated", problem, saddle + 0.1 * (1 - saddle), lam) > 0  # above it it rises, at any multiplier


# --------------------------------------------------------------------------- per prompt


@pytest.mark.parametrize("seed", SEEDS)
def test_per_prompt_of_two_samples_has_every_prompts_exact_direction(seed: int) -> None:
    """Expectation over all pairs of answers: P(other's cost + m > 0) d E_y[c | x], whatever the critic says."""
    problem, pi = random_table(seed, prompts=3, answers=4)
    margin, weights, costs = 0.3, torch.from_numpy(pi), torch.from_numpy(problem.costs)
    k = pi.shape[1]
    first = torch.tensor(list(itertools.product(range(k), range(k))))  # (K^2, 2)
    for critic in (0.0, 5.0):
        for n in range(len(pi)):
            rows = first.reshape(-1)
            table = Problem(problem.reference[n : n + 1], 0 * problem.rewards[n : n + 1], problem.costs[n : n + 1])
            rollout = pick(table, rows, critic)
            algorithm = RePO(beta=0.0, form="per_prompt", margin=margin)
            advantages = algorithm.advantages(measured(algorithm, rollout), 1.0).policy.view(-1, 2)
            chance = weights[n][first].prod(1)  # (K^2,)
            step = torch.zeros(k, dtype=torch.float64)
            for j in (0, 1):
                a = torch.zeros(k, dtype=torch.float64).index_add(0, first[:, j], chance * advantages[:, j])
                step += (a - weights[n] * a.sum()) / 2  # sum over samples of A d log pi, one half each
            gate = float(weights[n][costs[n] + margin > 0].sum())
            mean = float((weights[n] * costs[n]).sum())
            exact = -gate * weights[n] * (costs[n] - mean) / 2  # lam 1, over 1 + lam
            torch.testing.assert_close(step, exact)


def pick(table: Problem, rows: Tensor, critic: float) -> Any:
    """A rollout of groups of two that holds these answers of a prompt in order; cost values `critic`."""
    rollout, _ = rollout_of(table, table.reference, table.costs.shape[1])
    prompts, responses = rollout.prompts, rollout.responses
    return replace(
        rollout,
        prompts=replace(prompts, input_ids=prompts.input_ids[rows], attention_mask=prompts.attention_mask[rows]),
        responses=replace(responses, ids=responses.ids[rows], mask=responses.mask[rows]),
        **{x: getattr(rollout, x)[rows] for x in ("logps", "ref_logps", "rewards", "costs", "reward_values")},
        cost_values=torch.full((len(rows), 1), critic, dtype=torch.float64),
        group_size=2,
    )


def test_per_prompt_ends_as_the_penalty_of_the_mean_where_the_others_agree() -> None:
    """Where all costs of a prompt have one sign the gate is sure: 1 or 0, and the gradient that of {E_y[c | x]}+."""
    costs = np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    problem = Problem(np.full((2, 3), 1 / 3), np.zeros((2, 3)), costs)
    pi = normalised(np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0]]))
    got = direction(RePO(beta=0.0, form="per_prompt"), problem, pi, 1.0)
    exact = -pi[0] * (costs[0] - pi[0] @ costs[0]) / 2
    torch.testing.assert_close(got[0], torch.from_numpy(exact))
    assert not got[1].any()


def test_the_violation_of_per_prompt_is_too_large_by_at_most_half_a_deviation() -> None:
    # E{mean of G}+ >= {E c}+ by Jensen; c ~ N(0, 1), G = 4: sd of the mean .5, E{mean}+ = .5 / sqrt(2 pi) = .1995
    costs = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    _, got = RePO(form="per_prompt").constraint(fixed(0.0)).observe(costs)
    assert got == pytest.approx(0.1995, abs=2e-3) and 0 <= got <= 0.25
