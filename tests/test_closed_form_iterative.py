"""One-shot and iterative dualisation against closed forms, on tabular problems whose optimum is known.

A problem: N prompts, Y answers each, with r (N, Y), g (N, Y, K) and a reference (N, Y) that has probabilities m_ij / G
with whole m_ij, so that G samples can stand for it exactly: every expectation over "samples" is then exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, minimize_scalar
from torch import Tensor

from safe_rlhf_v.algorithms import caid, can
from safe_rlhf_v.algorithms.caid import Iterate, Measured
from safe_rlhf_v.algorithms.can import OneShot, OneShotSolution
from safe_rlhf_v.iterative import loop as iterative
from safe_rlhf_v.iterative.loop import IterativeArguments, IterativeResult, iterate
from safe_rlhf_v.statistics import Interval

D = torch.float64


@dataclass
class Tabular:
    """A problem of N prompts, and its exact solution for given multipliers. weights (N, Y) sum to G in each prompt."""

    r: Tensor
    g: Tensor
    weights: Tensor
    beta: float

    @property
    def ref(self) -> Tensor:
        return self.weights / self.weights.sum(1, keepdim=True)

    @property
    def reference(self) -> Tensor:
        """(N, K) E_ref g of each prompt."""
        return torch.einsum("ny,nyk->nk", self.ref, self.g)

    def samples(self) -> tuple[Tensor, Tensor]:
        """(N, G) rewards and (N, G, K) gains of samples that hold each answer as often as ref does."""
        index = torch.stack([torch.repeat_interleave(torch.arange(len(w)), w.long()) for w in self.weights])
        return self.r.gather(1, index), torch.stack([self.g[i, index[i]] for i in range(len(index))])

    def optimum(self, lam: Sequence[float]) -> Tensor:
        """(N, Y) pi*(lam) ~ ref exp((r + lam.g)/beta)."""
        return (self.ref.log() + (self.r + self.g @ torch.tensor(list(lam), dtype=D)) / self.beta).softmax(1)

    def improvement(self, policy: Tensor) -> Tensor:
        """(K,) E_pi g - E_ref g."""
        return (torch.einsum("ny,nyk->nk", policy, self.g) - self.reference).mean(0)

    def objective(self, policy: Tensor) -> float:
        """E_pi r - beta KL(pi || ref)."""
        kl = (policy * (policy.clamp(min=1e-300) / self.ref).log()).sum(1)
        return ((policy * self.r).sum(1) - self.beta * kl).mean().item()

    def dual(self, lam: Sequence[float], bounds: Tensor) -> float:
        """D(lam), by the definition."""
        h = self.g - self.reference[:, None] - bounds
        inner = (self.ref * ((self.r + h @ torch.tensor(list(lam), dtype=D)) / self.beta).exp()).sum(1)
        return float(self.beta * inner.log().mean())

    def solve(self, bounds: Tensor) -> np.ndarray[Any, Any]:
        """lam* by scipy, from several starts: D is convex."""
        k = len(bounds)
        found = [
            minimize(self.dual, [s] * k, args=(bounds,), bounds=[(0, None)] * k, method="L-BFGS-B", tol=1e-13)
            for s in (0.0, 0.5)
        ]
        return min(found, key=lambda f: f.fun).x  # type: ignore[no-any-return]


def problem(seed: int, n: int = 3, y: int = 5, k: int = 1, beta: float = 0.5) -> Tabular:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 6, (n, y), generator=generator).double()
    weights[:, 0] += 24 - weights.sum(1) + y  # G = 24 + y samples, whatever the others are
    r = torch.randn(n, y, generator=generator, dtype=D)
    g = torch.randn(n, y, k, generator=generator, dtype=D)
    return Tabular(r, g, weights, beta)


def reachable(p: Tabular, share: float) -> Tensor:
    """Bounds that ask for `share` of what the answers of the largest sum of gains reach: all of them at once."""
    index = p.g.sum(-1).argmax(1)
    best = p.g[torch.arange(len(index)), index].mean(0) - p.reference.mean(0)
    return share * best


def binding(p: Tabular, share: float) -> Tensor:
    """A bound, for K = 1, between what the unconstrained optimum improves and what can be reached."""
    low, high = p.improvement(p.optimum([0.0])), p.g.amax(1).mean(0) - p.reference.mean(0)
    return low + share * (high - low)


# --- the one-shot solver ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95), beta=st.sampled_from([0.1, 0.5, 2.0]))
def test_one_shot_reaches_the_root_in_one_dimension(seed: int, share: float, beta: float) -> None:
    p = problem(seed, beta=beta)
    bound = binding(p, share)
    root = brentq(lambda lam: float(p.improvement(p.optimum([lam]))[0] - bound[0]), 0.0, 1e4, xtol=1e-10)
    solution = OneShot(beta=beta).solve(*p.samples(), bound)
    assert solution.verdict == "optimal"
    assert solution.multipliers[0] == pytest.approx(root, abs=1e-2, rel=1e-3)
    assert torch.allclose(p.optimum(solution.multipliers), p.optimum([root]), atol=1e-2)
    assert solution.improvement[0] == pytest.approx(bound.item(), abs=1e-3)
    assert solution.dual == pytest.approx(p.dual([root], bound), abs=1e-3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9), k=st.sampled_from([2, 3]))
def test_one_shot_reaches_the_optimum_of_several_constraints(seed: int, share: float, k: int) -> None:
    p = problem(seed, k=k)
    bounds = reachable(p, share)
    solution = OneShot(beta=p.beta).solve(*p.samples(), bounds)
    expected = p.solve(bounds)
    assert solution.verdict == "optimal"
    assert solution.multipliers == pytest.approx(expected.tolist(), abs=1e-2, rel=1e-2)
    improvement = p.improvement(p.optimum(solution.multipliers))
    assert (improvement - bounds).min() > -1e-3  # every constraint holds
    slackness = torch.tensor(solution.multipliers) * (improvement - bounds)
    assert slackness.abs().max() < 1e-2  # and those with a multiplier hold exactly


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), excess=st.floats(1.001, 3.0), k=st.sampled_from([1, 2]))
def test_one_shot_says_when_bounds_are_out_of_reach(seed: int, excess: float, k: int) -> None:
    p = problem(seed, k=k)
    highest = p.g.amax(1).mean(0) - p.reference.mean(0)  # of each constraint alone
    solution = OneShot(beta=p.beta).solve(*p.samples(), excess * highest)
    assert (solution.verdict, solution.proven) == ("infeasible", True)
    assert solution.reachable == pytest.approx(highest.tolist())


def test_bounds_that_exclude_each_other_are_out_of_reach() -> None:
    # One prompt, answers with g = (1, -1) and (-1, 1), equally likely: each bound alone is reached, both are not.
    p = Tabular(torch.zeros(1, 2, dtype=D), torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=D), torch.ones(1, 2), 1.0)
    solution = OneShot(beta=1.0).solve(*p.samples(), torch.tensor([0.5, 0.5]))
    assert (solution.verdict, solution.proven) == ("infeasible", True)
    assert solution.reachable == pytest.approx([1.0, 1.0])


def test_five_failures_without_a_proof_are_a_verdict_too() -> None:
    # b is what the best answers reach but for a thousandth: there is an optimum, too far away for so few steps.
    p = problem(3)
    solution = OneShot(beta=p.beta, max_steps=4).solve(
        *p.samples(), 0.999 * (p.g.amax(1).mean(0) - p.reference.mean(0))
    )
    assert (solution.verdict, solution.proven, solution.restarts) == ("infeasible", False, 4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), less=st.floats(0.01, 2.0))
def test_slack_bounds_leave_the_unconstrained_policy(seed: int, less: float) -> None:
    p = problem(seed, k=2)
    bounds = p.improvement(p.optimum([0.0, 0.0])) - less
    solution = OneShot(beta=p.beta).solve(*p.samples(), bounds)
    assert (solution.verdict, solution.multipliers) == ("optimal", (0.0, 0.0))


def test_one_shot_by_hand() -> None:
    # Two answers, equally likely, r = 0 and g = +-1, beta 1: pi*(lam) gives +1 with sig(2 lam), so the improvement is
    # tanh(lam). b = .5: lam* = atanh .5 = .5493; D = log cosh lam - lam b = .1438 - .2747.
    p = Tabular(torch.zeros(1, 2, dtype=D), torch.tensor([[[1.0], [-1.0]]], dtype=D), torch.ones(1, 2), 1.0)
    solution = OneShot(beta=1.0).solve(*p.samples(), torch.tensor([0.5]))
    assert solution.multipliers[0] == pytest.approx(0.5493, abs=1e-4)
    assert solution.dual == pytest.approx(0.1438 - 0.2747, abs=1e-4)


# --- PeCAN ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), lam=st.floats(0, 3), bound=st.floats(-1, 2), beta=st.sampled_from([0.1, 1.0]))
def test_pecan_dual_and_gradient_are_those_of_the_definition(seed: int, lam: float, bound: float, beta: float) -> None:
    """With R, G the log-ratios of pi_r and pi_g: grad D / beta = mean sum p G + KL(ref || pi_g) - b / beta."""
    p, generator = problem(seed, beta=beta), torch.Generator().manual_seed(seed)
    helpful, safe = (torch.randn(p.r.shape, generator=generator, dtype=D).log_softmax(1) for _ in range(2))
    big_r, big_g, b = helpful - p.ref.log(), safe - p.ref.log(), torch.tensor([bound], dtype=D)
    scores, gains = can.preference_scores(helpful, safe, p.ref.log(), beta)
    exact = Tabular(scores, gains[..., None], p.weights, beta)
    rewards, g = exact.samples()
    h, at = can.relative(g, b), torch.tensor([lam], dtype=D)
    assert can.dual_value(rewards, h, at, beta).mean().item() == pytest.approx(exact.dual([lam], b), abs=1e-9)
    gradient = can.dual_gradient(rewards, h, at, beta).item()
    weights = (p.ref.log() + big_r + lam * big_g).softmax(1)
    kl = -(p.ref * big_g).sum(1).mean()  # KL(ref || pi_g)
    released = (weights * big_g).sum(1).mean() + kl - bound / beta
    assert gradient == pytest.approx(beta * released.item(), abs=1e-9)
    values = [exact.dual([lam + step], b) for step in (-1e-4, 0.0, 1e-4)]
    assert gradient == pytest.approx((values[2] - values[0]) / 2e-4, abs=1e-5)
    second = (values[2] - 2 * values[1] + values[0]) / 1e-8
    assert can.curvature(rewards, h, at, beta).item() == pytest.approx(second, rel=1e-3, abs=1e-4)


# --- CAID -------------------------------------------------------------------------------------------------------------


@dataclass
class Exact:
    """The loop's problem on a table: the inner maximiser is exact, and "samples" are the answers themselves.

    shift: added to the one-shot multipliers, to start the dual elsewhere.
    """

    table: Tabular
    bounds: Tensor
    shift: float = 0.0
    policies: list[Tensor] = field(default_factory=list)
    killed_at: int = 0

    @property
    def names(self) -> list[str]:
        return [str(k) for k in range(len(self.bounds))]

    def one_shot(self) -> tuple[OneShotSolution, list[float]]:
        rewards, gains = self.table.samples()
        found = OneShot(beta=self.table.beta).solve(rewards, gains, self.bounds)
        moved = {**{f: getattr(found, f) for f in found.__slots__}}
        moved["multipliers"] = tuple(m + self.shift for m in found.multipliers)
        rates = caid.dual_rates(found, rewards, gains, self.bounds, self.table.beta)
        return OneShotSolution(**moved), rates

    def fit(self, multipliers: Sequence[float], iteration: int) -> None:
        if iteration == self.killed_at:
            raise KeyboardInterrupt
        self.policies.append(self.maximise(multipliers))

    def maximise(self, multipliers: Sequence[float]) -> Tensor:
        return self.table.optimum(multipliers)

    def measure(self, multipliers: Sequence[float], iteration: int) -> Measured:
        """`caid.measure` of every answer once, weighed by the policy: what endless samples would give."""
        t, pi, lam = self.table, self.policies[-1], torch.tensor(list(multipliers), dtype=D)
        h = can.relative(t.g, self.bounds, t.reference)
        log_ratio = pi.clamp(min=1e-300).log() - t.ref.log()
        dual = t.beta * (t.ref * ((t.r + h @ lam) / t.beta).exp()).sum(1).log()
        reward, kl = (pi * t.r).sum(1), (pi * log_ratio).sum(1)
        slack = torch.einsum("ny,nyk->nk", pi, h)
        primal = reward - t.beta * kl
        return Measured(primal=primal, dual=dual, slack=slack, reward=reward, kl=kl, duals={}, effective=kl)


def run(exact: Exact, folder: Path, iterations: int, eta: Any = "auto") -> IterativeResult:
    return iterate(exact, IterativeArguments(output_dir=folder, iterations=iterations, eta=eta, bootstrap=100))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.8))
def test_caid_with_an_exact_maximiser_reaches_the_optimum(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    """From multipliers that are off by .7 it comes back to lam* and pi*, and its gap closes."""
    p = problem(seed)
    bound = binding(p, share)
    exact = Exact(p, bound, shift=0.7)
    result = run(exact, tmp_path_factory.mktemp("caid"), 60)
    (expected,) = p.solve(bound)
    assert result.multipliers[0] == pytest.approx(expected, abs=1e-2)
    assert torch.allclose(exact.policies[-1], p.optimum([expected]), atol=1e-2)
    gaps = [x.gap.value for x in result.iterates]
    assert gaps[-1] < 1e-2
    assert gaps[0] > gaps[-1]
    for x, policy in zip(result.iterates, exact.policies, strict=True):
        # D(lam) - L(pi, lam) = beta KL(pi || pi*(lam)) is 0 for the exact maximiser; so the gap is lam u.
        assert x.suboptimality.value == pytest.approx(0.0, abs=1e-9)
        assert x.gap.value == pytest.approx(x.multipliers[0] * x.slack[0], abs=1e-9)
        assert x.primal.value == pytest.approx(p.objective(policy), abs=1e-9)


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.7))
def test_preference_based_dualisation_ends_where_the_scores_would(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    """pi_r ~ ref exp(r / beta) and pi_g ~ ref exp(g / beta), what DPO makes of true preferences, stand for r and g:
    their log-ratios differ from the scores by a constant of the prompt alone. Same lam*, same pi*, same verdict.
    """
    p = problem(seed)
    ref, bound = p.ref.log(), binding(p, share)
    helpful, safe = ((ref + x / p.beta).log_softmax(1) for x in (p.r, p.g[..., 0]))
    rewards, gains = can.preference_scores(helpful, safe, ref, p.beta)
    implied = Tabular(rewards, gains[..., None], p.weights, p.beta)
    exact = Exact(implied, bound, shift=0.7)
    result = run(exact, tmp_path_factory.mktemp("pecaid"), 40)
    (expected,) = p.solve(bound)
    assert result.one_shot.multipliers[0] - 0.7 == pytest.approx(expected, abs=1e-2)  # PeCAN
    assert result.multipliers[0] == pytest.approx(expected, abs=1e-2)  # PeCAID
    assert torch.allclose(exact.policies[-1], p.optimum([expected]), atol=1e-2)
    highest = p.g.amax(1).mean(0) - p.reference.mean(0)
    verdict = OneShot(beta=p.beta).solve(*implied.samples(), 1.01 * highest)
    assert (verdict.verdict, verdict.proven) == ("infeasible", True)
    assert verdict.reachable == pytest.approx(highest.tolist())


def test_caid_with_two_constraints_reaches_the_optimum(tmp_path: Path) -> None:
    p = problem(11, k=2)
    bounds = reachable(p, 0.5)
    exact = Exact(p, bounds, shift=0.5)
    result = run(exact, tmp_path, 150, eta=0.3)
    assert result.multipliers == pytest.approx(p.solve(bounds).tolist(), abs=1e-2)
    assert min(result.multipliers) > 0.1  # both bind


def test_infeasible_bounds_end_the_loop_before_it_begins(tmp_path: Path) -> None:
    p = problem(0)
    exact = Exact(p, 1.1 * (p.g.amax(1).mean(0) - p.reference.mean(0)))
    result = run(exact, tmp_path, 3)
    assert (result.one_shot.verdict, result.best, result.iterates, exact.policies) == ("infeasible", None, [], [])


def test_slack_bounds_keep_the_multiplier_at_0(tmp_path: Path) -> None:
    p = problem(0)
    exact = Exact(p, p.improvement(p.optimum([0.0])) - 0.5)
    result = run(exact, tmp_path, 3)
    assert [x.multipliers for x in result.iterates] == [(0.0,)] * 3
    assert torch.allclose(exact.policies[-1], p.optimum([0.0]))
    assert (result.feasible, result.iterates[0].gap.value) == (True, pytest.approx(0.0, abs=1e-9))


# --- a parametrisation that does not hold every policy: nu > 0 --------------------------------------------------------


class Restricted(Exact):
    """One vector of scores for all prompts: pi_theta(y | x) ~ ref(y | x) exp(theta_y), theta in R^Y."""

    def maximise(self, multipliers: Sequence[float]) -> Tensor:
        t = self.table
        scores = t.r + t.g @ torch.tensor(list(multipliers), dtype=D)

        def loss(theta: Any) -> tuple[float, Any]:
            x = torch.tensor(theta, dtype=D, requires_grad=True)
            logps = (t.ref.log() + x).log_softmax(1)
            value = -(logps.exp() * (scores - t.beta * (logps - t.ref.log()))).sum(1).mean()
            value.backward()
            return value.item(), x.grad.numpy()  # type: ignore[union-attr]

        found = minimize(loss, np.zeros(t.r.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9})
        return (t.ref.log() + torch.tensor(found.x, dtype=D)).softmax(1)


def restricted(seed: int) -> Restricted:
    """Halfway between what the class improves without a multiplier and what it can improve at all."""
    p = problem(seed, n=4, y=6)
    exact = Restricted(p, torch.zeros(1, dtype=D))
    free, highest = (p.improvement(exact.maximise([lam])) for lam in (0.0, 1e3))
    exact.bounds = free + 0.5 * (highest - free)
    return exact


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_multi_shot_gives_what_was_asked_where_one_shot_does_not(seed: int, tmp_path: Path) -> None:
    exact = restricted(seed)
    result = run(exact, tmp_path, 10)
    missed = [abs(x.slack[0]) for x in result.iterates]
    assert missed[0] > 0.02  # one-shot: its multiplier is that of all distributions
    assert missed[-1] < 0.1 * missed[0]
    chosen = result.iterates[result.best or 0]
    assert abs(chosen.slack[0]) <= missed[0]
    for x in result.iterates:
        assert x.suboptimality.value > 0  # pi*(lam) is no policy of this parametrisation


def test_where_the_improvement_jumps_over_the_bound_the_best_iterate_is_feasible(tmp_path: Path) -> None:
    """L of this class has two maxima, and the better one changes at some lam: no lam gives b, and the gap stays."""
    result = run(restricted(2), tmp_path, 12)
    slack = [x.slack[0] for x in result.iterates]
    assert min(abs(s) for s in slack) > 0.05
    assert min(slack) < 0 < max(slack)
    chosen = result.iterates[result.best or 0]
    assert (result.feasible, chosen.slack[0] > 0) == (True, True)
    assert chosen.gap.value > 0.05  # the duality gap of a class that is not convex
    assert result.iterates[-1].slack[0] != chosen.slack[0]  # the last one is not it


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.7), m=st.sampled_from([4, 8, 16]))
def test_the_primal_dual_gap_of_a_coarse_policy_class_is_bounded(seed: int, share: float, m: int) -> None:
    """Policies whose probabilities are multiples of 1/m; P and D_p by enumeration.

    Rounding reaches every distribution within L1 distance nu = Y / (2m), so 0 <= D*_p - P*_p <= (M + beta + M lam*) nu
    [paper], M a bound of |r| and |h|.
    """
    p = problem(seed, n=1, y=3)
    counts = [c for c in itertools.product(range(m + 1), repeat=3) if sum(c) == m]
    policies = torch.tensor(counts, dtype=D) / m
    objective = torch.tensor([p.objective(x[None]) for x in policies], dtype=D)
    bound = binding(p, share)
    slack = (policies @ p.g[0]).squeeze(1) - p.reference[0, 0] - bound
    primal = objective[slack >= 0].max().item()
    best = minimize_scalar(
        lambda lam: (objective + lam * slack).max().item(), bounds=(0, 1e4), method="bounded", options={"xatol": 1e-8}
    )
    largest = max(p.r.abs().max().item(), (p.g[0] - p.reference[0] - bound).abs().max().item())
    gap, nu = best.fun - primal, 3 / (2 * m)
    assert -1e-6 <= gap <= (largest + p.beta + largest * best.x) * nu
    # The dual of the class is below that of all distributions, and not by more than the same order.
    (lam_star,) = p.solve(bound)
    assert -1e-6 <= p.dual([lam_star], bound) - best.fun <= (largest + p.beta + largest * lam_star) * nu


# --- the parts --------------------------------------------------------------------------------------------------------


def test_measures_of_on_policy_samples_by_hand() -> None:
    # One prompt, two samples: r (1, 2), g (0, 1), log pi/ref (.5, -.5); E_ref g = .2, b = .3, lam 2, beta 1.
    # primal: (.5 + 2.5)/2 = 1.5. h = (-.5, .5), slack 0. dual: log mean exp(1 - 1 - .5, 2 + 1 + .5)
    #   = log((e^-.5 + e^3.5)/2) = log(16.8609) = 2.82500. kl 0.
    arguments = [torch.tensor(x, dtype=D) for x in ([[1, 2]], [[[0], [1]]], [[0.5, -0.5]], [[0.2]], [0.3], [2.0])]
    found = caid.measure(*arguments, beta=1.0)
    assert (found.primal.item(), found.slack.item(), found.kl.item()) == pytest.approx((1.5, 0.0, 0.0))
    assert found.dual.item() == pytest.approx(2.825, abs=1e-3)


def test_on_policy_estimate_of_the_dual_is_that_of_the_definition() -> None:
    """Many samples of a policy that is not pi*: importance weights give back D(lam)."""
    p = problem(5, n=2, y=4)
    policy = (p.optimum([0.5]) + 0.3).softmax(1)
    index = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    gains = torch.stack([p.g[i, index[i]] for i in range(2)])
    ratios = (policy / p.ref).log().gather(1, index)
    bounds, lam = torch.tensor([0.4], dtype=D), torch.tensor([1.3], dtype=D)
    found = caid.measure(p.r.gather(1, index), gains, ratios, p.reference, bounds, lam, p.beta)
    assert found.dual.mean().item() == pytest.approx(p.dual([1.3], bounds), abs=5e-3)
    assert found.slack.mean().item() == pytest.approx((p.improvement(policy) - bounds).item(), abs=1e-2)
    assert found.primal.mean().item() == pytest.approx(p.objective(policy), abs=1e-2)


def test_pseudo_labels_are_drawn_with_the_sigmoid_of_the_difference() -> None:
    n = 40_000
    rewards = torch.tensor([[0.0, 0.4]]).repeat(n, 1)
    gains = torch.tensor([[[1.0, 0.0], [0.2, 0.5]]]).repeat(n, 1, 1)
    drawn = caid.pseudo_labels(rewards, gains, torch.tensor([2.0, 1.0]), torch.Generator().manual_seed(0))
    # r_lam = 0 + 2 * 1 + 0 = 2 and .4 + 2 * .2 + .5 = 1.3: sig(-.7) = .3318, standard error .0024
    assert drawn.float().mean().item() == pytest.approx(0.3318, abs=0.01)
    at_zero = caid.pseudo_labels(rewards, gains, torch.zeros(2), torch.Generator().manual_seed(0))
    assert at_zero.float().mean().item() == pytest.approx(0.5987, abs=0.01)  # sig(.4): helpfulness alone


def test_labels_and_dpo_together_have_the_constrained_optimum() -> None:
    """Minimising the expected DPO loss over free log-ratios, on pairs labelled at lam*, gives pi*(lam*)."""
    p = problem(2, n=1, y=3)
    bound = binding(p, 0.5)
    lam = torch.tensor(p.solve(bound), dtype=D)
    scores = caid.lagrangian_scores(p.r, p.g, lam)[0]  # (Y,)
    prefer = (scores[:, None] - scores).sigmoid()  # p(y_i > y_j)
    theta = torch.zeros(3, dtype=D, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        ratio = (p.ref[0].log() + theta).log_softmax(0) - p.ref[0].log()
        value = -(prefer * torch.nn.functional.logsigmoid(p.beta * (ratio[:, None] - ratio))).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    policy = (p.ref[0].log() + theta.detach()).softmax(0)
    assert torch.allclose(policy, p.optimum(lam.tolist())[0], atol=1e-2)
    assert p.improvement(policy[None]).item() == pytest.approx(bound.item(), abs=1e-2)


def iterate_of(primal: float, *slack: float) -> Iterate:
    one = Interval(value=primal, low=primal, high=primal, n=1)
    return Iterate(
        iteration=1, multipliers=(0.0,), primal=one, dual=one, gap=one, suboptimality=one,
        improvement=(one,), slack=slack, reward=0.0, kl=0.0, duals={}, effective=9.0,
    )  # fmt: skip


def test_best_iterate_by_hand() -> None:
    # The highest objective, 5, misses a bound; of the feasible ones 3 is best; the last is worse.
    rows = [iterate_of(5.0, 0.1, -0.1), iterate_of(2.0, 0.5, 0.5), iterate_of(3.0, 0.0, 0.2), iterate_of(1.0, 1.0, 1.0)]
    assert caid.best(rows) == (2, True)
    # None feasible: the worst constraint is missed by .3, .2 and .5.
    rows = [iterate_of(9.0, -0.3, 1.0), iterate_of(0.0, -0.2, -0.2), iterate_of(9.0, 0.4, -0.5)]
    assert caid.best(rows) == (1, False)


def test_steps_of_the_multipliers() -> None:
    # lam (1, .5), b (2, -1): the first step size is lam/b = .5; the second, where that has no meaning, 1/curvature.
    rewards, gains = torch.zeros(1, 2, dtype=D), torch.tensor([[[1.0, 0.0], [-1.0, 2.0]]], dtype=D)
    solution = OneShotSolution(
        verdict="optimal",
        multipliers=(0.0, 0.0),
        dual=0,
        improvement=(),
        reachable=(),
        proven=False,
        steps=1,
        restarts=0,
    )
    bounds = torch.tensor([2.0, -1.0], dtype=D)
    # At lam 0 both answers weigh 1/2: variances 1 and 1, over beta .5: curvatures 2 and 2.
    assert caid.dual_rates(solution, rewards, gains, bounds, 0.5) == pytest.approx([0.5, 0.5])
    moved = OneShotSolution(**{**{f: getattr(solution, f) for f in solution.__slots__}, "multipliers": (1.0, 0.0)})
    assert caid.dual_rates(moved, rewards, gains, bounds, 0.5)[0] == pytest.approx(0.5)


def test_adapted_steps_follow_the_secant_at_most_twofold() -> None:
    at = lambda lam, u: dataclasses.replace(iterate_of(0.0, *u), multipliers=lam)  # noqa: E731
    before, now = at((1.0, 1.0, 1.0, 1.0), (-0.4, -0.4, -0.4, -0.4)), at((2.0, 2.0, 2.0, 1.0), (0.4, -0.39, -0.5, 0.1))
    # Secants 1/.8 = 1.25; 1/.01 = 100, at most 2; u fell: as it was; lam stood still: as it was.
    assert caid.adapted_rates([1.0] * 4, before, now) == pytest.approx([1.25, 2.0, 1.0, 1.0])
    assert caid.adapted_rates([4.0], at((1.0,), (-0.4,)), at((2.0,), (0.4,))) == pytest.approx([2.0])  # at least half


def test_states_of_the_first_version_hold_no_number_of_prompts() -> None:
    row = dataclasses.asdict(iterate_of(1.5, 0.25))
    for interval in (row["primal"], row["dual"], row["gap"], row["suboptimality"], *row["improvement"]):
        del interval["n"]
    read = iterative._iterate(row)
    assert read.primal == Interval(value=1.5, low=1.5, high=1.5, n=0) and read.slack == (0.25,)


def test_a_killed_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    p = problem(4)
    bound = binding(p, 0.6)
    whole = run(Exact(p, bound, shift=0.7), tmp_path / "whole", 5)
    with pytest.raises(KeyboardInterrupt):
        run(Exact(p, bound, shift=0.7, killed_at=3), tmp_path / "killed", 5)
    resumed = run(Exact(p, bound, shift=0.7), tmp_path / "killed", 5)
    assert resumed == whole
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert len(rows[0]) == len(rows[1]) == 5


def test_effective_samples_by_hand() -> None:
    """Equal weights count whole: 4. Weights 3, 1: 16 / 10. One weight alone: 1, also where the others underflow."""
    rows = [[2.0] * 4, [math.log(3.0), 0.0, -1e4, -1e4], [0.0, -1e4, -1e4, -1e4]]
    assert caid.effective_samples(torch.tensor(rows, dtype=D)).tolist() == pytest.approx([4.0, 1.6, 1.0])


def test_the_larger_estimate_of_the_dual_stands() -> None:
    """One prompt, lam 0, beta 1. The policy's two samples (reward 0, log ratio 0) give D 0; the reference's rewards
    log 1 and log 3 give log((1 + 3)/2) = log 2. With a reference of rewards -5 the policy's stands."""
    none, gains = torch.zeros(1, 2, dtype=D), torch.zeros(1, 2, 1, dtype=D)
    zero = torch.zeros(1, 1, dtype=D)
    for of_ref, stands in (([0.0, math.log(3.0)], math.log(2.0)), ([-5.0, -5.0], 0.0)):
        rewards = torch.tensor([of_ref], dtype=D)
        found = caid.measure(none, gains, none, zero, zero[0], zero[0], 1.0, (rewards, gains))
        assert found.dual.item() == pytest.approx(stands)
        assert found.duals["policy"] == pytest.approx(0.0)
        assert found.effective.item() == pytest.approx(2.0)
