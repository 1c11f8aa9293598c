"""CRPO, constraint-rectified policy optimisation (arXiv 2011.05869): no multiplier, one objective at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from safe_rlhf_v.algorithms.two_critics import streams
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class CRPO:
    """A = A_r while J_c <= d + tolerance, else A = -A_c [secondary], on PPO and with the KL in both streams [ours].

    Near the bound it switches to and fro. A share s of cost steps acts as the multiplier s / (1 - s), so it hovers
    about PPO-Lagrangian's solution for the threshold d + tolerance, within a step's length. The paper returns the mean
    over the iterates that keep the bound; here it is the last one [ours]. The window is short: with a long one a switch
    comes late and overshoots.
    """

    threshold: float = 0.0  # d
    tolerance: float = 0.0  # eta
    beta: float = 0.02
    clip: float = 0.2
    value_clip: float = 5.0
    gamma: float = 1.0
    lam: float = 0.95  # of GAE
    token_clamp: float = 50.0
    window: int = 0
    delay: ClassVar[int] = 0
    has_multiplier: ClassVar[bool] = False
    needs_critics: ClassVar[bool] = True

    def violation(self, costs: Tensor) -> float:
        return costs.double().mean().item() - self.threshold

    def advantages(self, rollout: Rollout, multiplier: float, violation: float) -> Advantages:
        both = streams(self, rollout, rollout.costs)
        policy = -both.cost if violation > self.tolerance else both.reward
        return Advantages(policy=policy, reward_returns=both.reward_returns, cost_returns=both.cost_returns)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        args = (logps, rollout.logps, advantages.policy, rollout.responses.mask, self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}
