"""PPO-Lagrangian of Safe RLHF-V (arXiv 2503.17682): min over theta, max over lam of -J_R + lam (E[c] - d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from safe_rlhf_v.algorithms.two_critics import streams
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOLag:
    """Two critics, two streams, one advantage A = (A_r - lam A_c) / (1 + lam). Defaults: the released code.

    threshold: d, the bound on the mean cost (text Safe RLHF, arXiv 2310.12773: 0, with beta .01).
    With `duals.fixed(lam)` it is PPO with reward shaping, R - lam C; with `duals.fixed(0)`, plain PPO on the reward.
    """

    threshold: float = -0.5  # d [code]
    beta: float = 0.02  # [code]
    clip: float = 0.2  # [code]
    value_clip: float = 5.0  # [code]
    gamma: float = 1.0  # [code]
    lam: float = 0.95  # of GAE [code]
    token_clamp: float = 50.0  # [code]
    window: int = 128  # episodes J_c is the mean of [code]
    delay: int = 1  # [code]
    has_multiplier: ClassVar[bool] = True
    needs_critics: ClassVar[bool] = True

    def violation(self, costs: Tensor) -> float:
        return costs.double().mean().item() - self.threshold

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        both = streams(self, rollout, rollout.costs)
        policy = (both.reward - multiplier * both.cost) / (1 + multiplier)
        return Advantages(policy=policy, reward_returns=both.reward_returns, cost_returns=both.cost_returns)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        args = (logps, rollout.logps, advantages.policy, rollout.responses.mask, self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}
