"""Problems whose constrained optimum is known: softmax policies over K answers of one token to N prompts.

Everything is float64. Tables are (N, K). A step is exact: the rollout holds every answer in proportion to the policy,
the critics are fitted to their end, and the algorithm's own loss gives the derivative of each answer's
log-probability, along which the log-probabilities move (the natural gradient of a softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from safe_rlhf_v.cost_measures import MEAN, CostMeasure
from safe_rlhf_v.duals import fixed
from safe_rlhf_v.types import Inputs, Responses, Rollout

Table = NDArray[np.float64]


def normalised(weights: Table) -> Table:
    return weights / weights.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Problem:
    """max E[r] - beta KL(pi || ref) s.t. E[c] <= d. reference, rewards, costs: (N, K)."""

    reference: Table
    rewards: Table
    costs: Table
    beta: float = 1.0

    def tilted(self, scores: Table, weight: float) -> Table:
        """ref exp(scores / weight), normalised."""
        logits = np.log(self.reference) + scores / weight
        return normalised(np.exp(logits - logits.max(-1, keepdims=True)))

    def optimum(self, lam: float) -> Table:
        """ref exp((r - lam c) / beta): maximises E[r] - lam E[c] - beta KL."""
        return self.tilted(self.rewards - lam * self.costs, self.beta)

    def kl_in_both(self, lam: float) -> Table:
        """ref exp((r - lam c) / (beta (1 + lam))): maximises E[r] - lam E[c] - beta (1 + lam) KL."""
        return self.tilted(self.rewards - lam * self.costs, self.beta * (1 + lam))

    def cost(self, pi: Table, costs: Table | None = None) -> float:
        """E[c], a mean over prompts."""
        return float((pi * (self.costs if costs is None else costs)).sum(-1).mean())


def random_problem(seed: int, prompts: int = 2, answers: int = 4, beta: float = 1.0) -> Problem:
    """Rewards and costs that lie apart by about 1, the helpful answers a little the costlier, as in life."""
    rng = np.random.default_rng(seed)
    shape = (prompts, answers)
    reference = normalised(rng.uniform(0.2, 1.0, shape))
    costs = rng.permuted(np.tile(np.linspace(-1.5, 1.5, answers), (prompts, 1)), axis=1) + rng.normal(0, 0.2, shape)
    return Problem(reference, 0.4 * costs + rng.normal(0, 0.6, shape), costs, beta)


def multiplier_of(problem: Problem, threshold: float, family: Callable[[float], Table], most: float = 50.0) -> float:
    """The lam at which E[c] under family(lam) is the threshold: 0 where slack, `most` where out of reach."""

    def violation(lam: float) -> float:
        return problem.cost(family(lam)) - threshold

    if violation(0.0) <= 0:
        return 0.0
    return float(brentq(violation, 0.0, most, xtol=1e-12)) if violation(most) < 0 else most


def counts_of(pi: Table, rows: int) -> NDArray[np.int64]:
    """(N, K) whole numbers in proportion to pi, at least 1 each, `rows` a prompt: largest remainders."""
    counts = np.maximum(1, np.floor(pi * rows).astype(np.int64))
    for row, left in zip(counts, pi * rows - counts, strict=True):
        missing = rows - row.sum()
        row[np.argsort(-left)[: max(missing, 0)]] += 1
        row[row.argmax()] += min(missing, 0)  # what the smallest were given
    return counts


def rollout_of(problem: Problem, pi: Table, rows: int) -> tuple[Rollout, Tensor]:
    """`rows` samples a prompt in proportion to pi, and each row's cell of the table (B,). Values are 0."""
    cells = torch.arange(pi.size).repeat_interleave(torch.from_numpy(counts_of(pi, rows).reshape(-1)))

    def look_up(table: Table) -> Tensor:
        return torch.from_numpy(table.reshape(-1).copy())[cells]

    ones = torch.ones(len(cells), 1)
    rollout = Rollout(
        prompts=Inputs(input_ids=ones.long(), attention_mask=ones),
        responses=Responses(ids=cells[:, None] % pi.shape[1], mask=ones.bool()),
        logps=look_up(np.log(pi))[:, None],
        ref_logps=look_up(np.log(problem.reference))[:, None],
        rewards=look_up(problem.rewards),
        costs=look_up(problem.costs),
        reward_values=torch.zeros(len(cells), 1, dtype=torch.float64),
        cost_values=torch.zeros(len(cells), 1, dtype=torch.float64),
        group_size=rows,
    )
    return rollout, cells


def measured(algorithm: Any, rollout: Rollout, measure: CostMeasure = MEAN) -> Rollout:
    """The rollout with its costs as the algorithm's constraint measures them."""
    constraint = algorithm.constraint(fixed(0.0), measure)
    constraint.observe(rollout.costs.view(-1, rollout.group_size))
    return replace(rollout, costs=constraint.measured(rollout.costs))


def by_cell(values: Tensor, cells: Tensor, shape: tuple[int, int]) -> Table:
    """Mean of (B,) values over the rows of each cell."""
    total = torch.zeros(shape[0] * shape[1], dtype=values.dtype).index_add(0, cells, values)
    return (total / torch.bincount(cells, minlength=len(total))).view(shape).numpy()


def with_fitted_critics(algorithm: Any, rollout: Rollout, cells: Tensor, pi: Table) -> Rollout:
    """Values that are the expected returns under pi. With values of 0 a one-token return is the stream itself."""
    returns = algorithm.advantages(rollout, 0.0, 0.0)

    def fitted(targets: Tensor) -> Tensor:
        means = (pi * by_cell(targets[:, 0], cells, pi.shape)).sum(-1)  # (N,)
        return torch.from_numpy(means)[cells // pi.shape[1]][:, None]

    return replace(rollout, reward_values=fitted(returns.reward_returns), cost_values=fitted(returns.cost_returns))


@dataclass
class Trained:
    """pi (N, K) and multiplier at the end; both averaged over the last half; the violations of every step."""

    pi: Table
    multiplier: float
    mean_pi: Table
    mean_multiplier: float
    violations: list[float]


def train(
    problem: Problem,
    algorithm: Any,
    dual: Any,
    *,
    steps: int = 300,
    rate: float = 0.5,
    rows: int = 1000,
    measure: CostMeasure = MEAN,
) -> Trained:
    """The loop of the online trainer with an exact step; rate: that of the natural gradient."""
    log_pi, constraint = np.log(problem.reference), algorithm.constraint(dual, measure)
    policies, multipliers, violations = [], [], []
    for _ in range(steps):
        pi = np.exp(log_pi)
        rollout, cells = rollout_of(problem, pi, rows)
        multiplier, violation = constraint.observe(rollout.costs.view(-1, rows))
        violations.append(violation)
        rollout = replace(rollout, costs=constraint.measured(rollout.costs))
        if algorithm.critics is not None:
            rollout = with_fitted_critics(algorithm, rollout, cells, pi)
        advantages = algorithm.advantages(rollout, multiplier, violation)
        logps = rollout.logps.clone().requires_grad_()
        algorithm.policy_loss(logps, rollout, advantages)[0].backward()
        assert logps.grad is not None
        direction = by_cell(-len(cells) * logps.grad[:, 0], cells, pi.shape)
        log_pi = log_pi + rate * direction
        log_pi -= np.log(np.exp(log_pi).sum(-1, keepdims=True))
        policies.append(np.exp(log_pi))
        multipliers.append(multiplier)
    half = steps // 2
    mean_pi, mean_multiplier = np.mean(policies[half:], axis=0), float(np.mean(multipliers[half:]))
    return Trained(policies[-1], multipliers[-1], mean_pi, mean_multiplier, violations)
