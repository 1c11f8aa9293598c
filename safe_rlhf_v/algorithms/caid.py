"""Constrained alignment by iterative dualisation (CAID), arXiv 2505.19387 (NeurIPS 2025).

The problem is that of `can`. One-shot multipliers are those of the best of all distributions; a model is not one of all
distributions, so what it reaches is not what was asked. CAID looks at what it does reach, and moves the multipliers:

    repeat:  theta <- argmax L(pi_theta, lam)  (pseudo-labels by r + lam.g, then DPO)
             u = E_x E_{y ~ pi_theta} h        (on-policy)
             lam <- [lam - eta u]_+            (`duals.VectorDual` on the violation -u)
    return the best iterate, not the last: the feasible one of the highest objective [ours; the paper: the least dual
    value]

Shapes: N prompts, G samples of the policy a prompt, K constraints. rewards, log_ratios (N, G), where log_ratios is the
sum over tokens of log pi - log ref; gains (N, G, K), g = -cost; reference (N, K), E_ref g of each prompt; bounds (K,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_rlhf_v.algorithms.can import OneShotSolution, curvature, dual_gradient, dual_value, relative
from safe_rlhf_v.statistics import DEFAULT, Interval, Resampling, mean_interval


def lagrangian_scores(rewards: Tensor, gains: Tensor, multipliers: Tensor) -> Tensor:
    """r_lam = r + lam.g, shaped as rewards; what is constant within a prompt (E_ref g, b) changes no preference."""
    return rewards + gains @ multipliers.to(gains)


def pseudo_labels(rewards: Tensor, gains: Tensor, multipliers: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) 0 or 1, which of two responses is preferred: 1 ~ Bernoulli(sig(r_lam(y1) - r_lam(y0))) [paper].

    rewards (B, 2), gains (B, 2, K). DPO on such labels has its optimum at ref exp(r_lam / beta), normalised.
    """
    scores = lagrangian_scores(rewards, gains, multipliers)
    return torch.bernoulli((scores[:, 1] - scores[:, 0]).sigmoid(), generator=generator).long()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A policy at multipliers lam, prompt by prompt. primal, dual, reward, kl, effective: (N,); slack: (N, K).

    primal: E r - beta KL. slack: E h, whose mean is the dual's gradient u. dual: of D(lam), which bounds every policy's
    L = primal + lam.slack from above; the larger in the mean of the estimates that `duals` names, since each of them
    lies below D in expectation (Jensen). effective: (sum w)^2 / sum w^2 of the importance weights w of a prompt's G
    samples, between 1 and G: how many of them the estimate rests on.
    """

    primal: Tensor
    dual: Tensor
    duals: dict[str, float]
    effective: Tensor
    slack: Tensor
    reward: Tensor
    kl: Tensor


def measure(
    rewards: Tensor,
    gains: Tensor,
    log_ratios: Tensor,
    reference: Tensor,
    bounds: Tensor,
    multipliers: Tensor,
    beta: float,
    of_reference: tuple[Tensor, Tensor] | None = None,
) -> Measured:
    """What on-policy samples say of a policy, in float64.

    of_reference: rewards (N, G') and gains (N, G', K) of samples of ref, for the second estimate of D(lam).

    D(lam) = beta E log E_ref exp((r + lam.h)/beta) [paper] is estimated as beta log mean_j exp((r + lam.h)/beta - log
    pi/ref) [ours]: the same expectation by importance from samples of pi, which stands near pi*(lam). Plain samples of
    ref never hold what pi* mostly says once KL(pi* || ref) passes log G, and weights of pi rest on few samples where it
    is far from pi*: so both are taken, and the larger in the mean stands. It is at least that of L, by Jensen.
    """
    rewards, log_ratios, lam = rewards.double(), log_ratios.double(), multipliers.double()
    h = relative(gains.double(), bounds.double(), reference.double())
    exponent = (rewards + h @ lam) / beta - log_ratios  # (N, G): log of the importance weights
    dual = {"policy": beta * (exponent.logsumexp(1) - math.log(exponent.shape[1]))}
    if of_reference is not None:
        ref_h = relative(of_reference[1].double(), bounds.double(), reference.double())
        dual["reference"] = dual_value(of_reference[0].double(), ref_h, lam, beta)
    means = {name: values.mean().item() for name, values in dual.items()}
    return Measured(
        primal=(rewards - beta * log_ratios).mean(1),
        dual=dual[max(means, key=means.__getitem__)],
        duals=means,
        effective=effective_samples(exponent),
        slack=h.mean(1),
        reward=rewards.mean(1),
        kl=log_ratios.mean(1),
    )


def effective_samples(log_weights: Tensor) -> Tensor:
    """(N,) (sum w)^2 / sum w^2 of the weights of each row, log_weights (N, G): G where they are equal, 1 where one
    sample has them all. Kish 1965, section 11.7."""
    return (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterate:
    """One iteration's policy: the multipliers it was trained for, and what it measures.

    improvement: E_pi g - E_ref g, to compare with the bound; slack: improvement - bound, u; one each a constraint.
    gap: dual - primal >= 0 for a feasible policy; suboptimality: dual - L = beta KL(pi || pi*(lam)) >= 0, the part
    that training left; the rest is lam.u, the part that the multipliers left. duals, effective: of `Measured`; the
    latter's mean over prompts.
    """

    iteration: int
    multipliers: tuple[float, ...]
    primal: Interval
    dual: Interval
    gap: Interval
    suboptimality: Interval
    improvement: tuple[Interval, ...]
    slack: tuple[float, ...]
    reward: float
    kl: float
    duals: dict[str, float]
    effective: float

    @property
    def shortfall(self) -> float:
        """By how much the worst constraint is missed; at most 0 when all hold."""
        return -min(self.slack)


def summarise(
    measured: Measured,
    iteration: int,
    multipliers: Sequence[float],
    bounds: Tensor,
    resampling: Resampling = DEFAULT,
) -> Iterate:
    """Means over prompts with intervals."""
    m, lam = measured, torch.tensor(tuple(multipliers), dtype=torch.float64)
    improvement = m.slack + bounds.double()  # (N, K)
    estimate = lambda values: mean_interval(values.double(), resampling=resampling)  # noqa: E731
    return Iterate(
        iteration=iteration,
        multipliers=tuple(multipliers),
        primal=estimate(m.primal),
        dual=estimate(m.dual),
        gap=estimate(m.dual - m.primal),
        suboptimality=estimate(m.dual - m.primal - m.slack @ lam),
        improvement=tuple(estimate(column) for column in improvement.T),
        slack=tuple(m.slack.mean(0).tolist()),
        reward=m.reward.mean().item(),
        kl=m.kl.mean().item(),
        duals=m.duals,
        effective=m.effective.mean().item(),
    )


def best(iterates: Sequence[Iterate]) -> tuple[int, bool]:
    """Index of the best iterate, and whether it is feasible.

    The feasible one of the highest objective; where none is, the one that misses its worst constraint by least [ours].
    The paper takes the one of the least dual value; that is an estimate from below, least where it is worst.
    """
    feasible = [i for i, x in enumerate(iterates) if x.shortfall <= 0]
    if feasible:
        return max(feasible, key=lambda i: iterates[i].primal.value), True
    return min(range(len(iterates)), key=lambda i: iterates[i].shortfall), False


def dual_rates(solution: OneShotSolution, rewards: Tensor, gains: Tensor, bounds: Tensor, beta: float) -> list[float]:
    """A step size eta for each multiplier, from the one-shot solution on samples of ref [ours].

    Raising lam_k from 0 to its one-shot value closed the shortfall s_k that is there with no multiplier, so a shortfall
    u is mended by lam_k u / s_k. Where lam_k is 0: the inverse curvature of D, and 0 where g never varies.
    """
    rewards, h = rewards.double(), relative(gains.double(), bounds.double())
    lam = torch.tensor(solution.multipliers, dtype=torch.float64)
    rates = (1.0 / curvature(rewards, h, lam, beta).diagonal()).nan_to_num(posinf=0.0)
    for k in lam.nonzero().flatten().tolist():
        without = lam.clone()
        without[k] = 0.0
        rates[k] = lam[k] / -dual_gradient(rewards, h, without, beta)[k]
    return [float(rate) for rate in rates]


def adapted_rates(rates: Sequence[float], before: Iterate, now: Iterate) -> list[float]:
    """The step sizes after one more look at the dual: secants of u between two iterates [ours].

    What a policy class gives for a rise of lam is not what the one-shot solution said. A step size changes at most
    twofold a time, and stays where lam stood still or where u fell as lam rose, which only noise can do.
    """
    adapted = []
    for k, rate in enumerate(rates):
        moved, gained = now.multipliers[k] - before.multipliers[k], now.slack[k] - before.slack[k]
        secant = moved / gained if moved * gained > 0 else rate
        adapted.append(min(max(secant, rate / 2), rate * 2))
    return adapted
