"""One-shot dualisation (CAN), arXiv 2405.19544 (NeurIPS 2024): MoCAN on scores, PeCAN on log-ratios of two policies.

    max over pi of  E_pi r - beta KL(pi || ref)   subject to   E_pi g_k - E_ref g_k >= b_k,   k = 1..K

With h = g - E_ref g - b the optimum is pi* ~ ref exp((r + lam.h)/beta), and lam* >= 0 minimises the convex function
D(lam) = beta E_x log E_ref exp((r + lam.h)/beta), which samples of ref alone can estimate: no policy is trained for it.

Shapes: N prompts, G samples of ref a prompt, K constraints. rewards (N, G); gains (N, G, K), g = -cost; bounds (K,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["optimal", "infeasible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dualisation:
    """A way to iterate, in words.

    one_shot: at the first multipliers alone. from_preferences: two policies trained by DPO, one on each axis, stand for
    the reward and the cost model.
    """

    words: str
    one_shot: bool = False
    from_preferences: bool = False


def relative(gains: Tensor, bounds: Tensor, reference: Tensor | None = None) -> Tensor:
    """h = g - E_ref g - b, (N, G, K). reference: E_ref g of each prompt (N, K); None where `gains` are ref's own."""
    mean = gains.mean(1) if reference is None else reference
    return gains - mean[:, None] - bounds


def preference_scores(helpful: Tensor, safe: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """PeCAN's stand-ins for scores: r = beta log(pi_r/ref) and g = beta log(pi_g/ref), shaped as the arguments.

    helpful, safe, reference: log-probabilities of the same responses under pi_r (DPO on helpfulness), pi_g (DPO on
    safety) and ref. E_ref g is then -beta KL(ref || pi_g), so `relative` gives h = beta log(pi_g/ref) + beta
    KL(ref || pi_g) - b, and MoCAN's gradient is beta times PeCAN's, mean sum p G + KL(ref || pi_g) - b/beta [code].
    """
    return beta * (helpful - reference), beta * (safe - reference)


def tilted(rewards: Tensor, h: Tensor, multipliers: Tensor, beta: float) -> Tensor:
    """p_ij = softmax_j((r_ij + lam.h_ij)/beta), (N, G): how much of pi* each sample of ref stands for."""
    return ((rewards + h @ multipliers) / beta).softmax(dim=1)


def dual_value(rewards: Tensor, h: Tensor, multipliers: Tensor, beta: float) -> Tensor:
    """D(lam) of each prompt, (N,): beta log mean_j exp((r_ij + lam.h_ij)/beta). Their mean estimates D, from below."""
    scores = (rewards + h @ multipliers) / beta  # (N, G)
    return beta * (scores.logsumexp(dim=1) - math.log(scores.shape[1]))


def dual_gradient(rewards: Tensor, h: Tensor, multipliers: Tensor, beta: float) -> Tensor:
    """(K,) mean_i sum_j p_ij h_ij: by how much pi*(lam) exceeds what is asked. Below 0: lam has to rise."""
    return torch.einsum("ng,ngk->k", tilted(rewards, h, multipliers, beta), h) / len(h)


def curvature(rewards: Tensor, h: Tensor, multipliers: Tensor, beta: float) -> Tensor:
    """(K, K) second derivative of D: the mean within-prompt covariance of h under `tilted`, over beta."""
    p = tilted(rewards, h, multipliers, beta)[..., None]  # (N, G, 1)
    centred = h - (p * h).sum(1, keepdim=True)
    return torch.einsum("ngk,ngl->kl", p * centred, centred) / len(h) / beta


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotSolution:
    """multipliers, improvement: one a constraint; improvement is E_pi*(lam) g - E_ref g, to compare with the bound.

    verdict: "infeasible" where no finite multipliers were found: the samples hold no policy that reaches the bounds.
    proven: that verdict is proven for these samples (`out_of_reach`), and not only by descents that failed.
    dual: D at the multipliers. reachable: the largest improvement of each constraint alone, that of the best sample of
    every prompt. steps, restarts: what it took.
    """

    verdict: Verdict
    multipliers: tuple[float, ...]
    dual: float
    improvement: tuple[float, ...]
    reachable: tuple[float, ...]
    proven: bool
    steps: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """Descent on D from lam = 0, projected on lam >= 0.

    The released code takes plain gradient steps, lam <- max(0, lam - lr grad), stops when the last five were all below
    tolerance 1e-5, shrinks lr and begins again on failure, and after 5 failures says that no finite optimum exists
    [code]. Stop and restart are the same here; the step is a Newton step of size lr with backtracking [ours]: the
    curvature of D changes by orders of magnitude between lam = 0 and lam*, so that plain steps oscillate or crawl, and
    called feasible problems infeasible. residual: the gradient that may be left where it stops [ours].
    """

    beta: float = 0.1
    lr: float = 1.0
    tolerance: float = 1e-5
    residual: float = 1e-4
    attempts: int = 5
    shrink: float = 0.3
    max_steps: int = 200

    def solve(self, rewards: Tensor, gains: Tensor, bounds: Tensor) -> OneShotSolution:
        """The multipliers for samples of ref. Bounds out of reach are no error: see `OneShotSolution.verdict`."""
        rewards, bounds = rewards.double(), bounds.double()
        h, steps = relative(gains.double(), bounds), 0
        for attempt in range(self.attempts):
            multipliers, taken, converged = self._descend(rewards, h, self.lr * self.shrink**attempt)
            steps += taken
            proven = not converged and out_of_reach(h, multipliers)
            if converged or proven:
                break
        return OneShotSolution(
            verdict="optimal" if converged else "infeasible",
            multipliers=tuple(multipliers.tolist()),
            dual=dual_value(rewards, h, multipliers, self.beta).mean().item(),
            improvement=tuple((dual_gradient(rewards, h, multipliers, self.beta) + bounds).tolist()),
            reachable=tuple((h.amax(1).mean(0) + bounds).tolist()),
            proven=proven,
            steps=steps,
            restarts=attempt,
        )

    def _descend(self, rewards: Tensor, h: Tensor, lr: float) -> tuple[Tensor, int, bool]:
        """One attempt: where it ended, (K,); steps taken; whether it settled."""
        multipliers, small = torch.zeros_like(h[0, 0]), 0
        for step in range(1, self.max_steps + 1):
            moved, left = self._step(rewards, h, multipliers, lr)
            small = small + 1 if (moved - multipliers).abs().max() < self.tolerance else 0
            multipliers = moved
            if small >= 5 and left < self.residual:
                return multipliers, step, True
            if out_of_reach(h, multipliers):
                return multipliers, step, False
        return multipliers, self.max_steps, False

    def _step(self, rewards: Tensor, h: Tensor, multipliers: Tensor, lr: float) -> tuple[Tensor, float]:
        """The next multipliers, and the largest gradient that the projection lets through."""
        gradient = dual_gradient(rewards, h, multipliers, self.beta)
        free = (multipliers > 0) | (gradient < 0)
        direction = newton_direction(gradient, curvature(rewards, h, multipliers, self.beta), free)
        longest = 10.0 * (1.0 + multipliers.max().item())  # D flattens out where bounds are out of reach
        direction = direction * min(1.0, longest / max(direction.abs().max().item(), 1e-12))
        here, size = dual_value(rewards, h, multipliers, self.beta).mean(), lr
        for _ in range(30):
            moved = (multipliers + size * direction).clamp(min=0.0)
            expected = torch.dot(gradient, moved - multipliers)
            if dual_value(rewards, h, moved, self.beta).mean() <= here + 1e-4 * expected:
                break
            size /= 2
        else:
            moved = multipliers
        return moved, (gradient.abs() * free).max().item()


def newton_direction(gradient: Tensor, second: Tensor, free: Tensor) -> Tensor:
    """(K,) minus the inverse curvature times the gradient, among the free multipliers; the others stay."""
    direction, index = torch.zeros_like(gradient), free.nonzero().flatten()
    if len(index):
        block = second[index][:, index]
        ridge = 1e-9 * block.diagonal().max().clamp(min=1e-9) * torch.eye(len(index), dtype=block.dtype)
        direction[index] = -torch.linalg.solve(block + ridge, gradient[index])
    return direction


def out_of_reach(h: Tensor, multipliers: Tensor) -> bool:
    """Whether these multipliers prove that no policy over the samples has E h_k >= 0 for every k [ours].

    Such a policy would have E mu.h >= 0 for every mu >= 0, but E mu.h <= mean_i max_j mu.h_ij: below 0 is the proof.
    """
    total = multipliers.sum()
    return bool(total > 0) and (h @ (multipliers / total)).amax(dim=1).mean().item() < 0
