"""RePO, rectified policy optimisation (NeurIPS 2025): C(x, y) <= 0 for every prompt, not for the mean.

A mean lets very safe replies pay for unsafe ones. max over theta, min over lam >= 0 of
E[r - beta KL] - lam E[{c}^+].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from safe_rlhf_v.algorithms.two_critics import streams
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RePO:
    """form "gated" [secondary, ours]: A = A_r where c <= 0, A = (A_r - lam A_c) / (1 + lam) where c > 0.
    form "rectified" [ours]: the terminal cost is {c}^+, and A = (A_r - lam A_c) / (1 + lam) everywhere.

    The violation mean{c}^+ - slack is never below 0 without slack, so the multiplier never falls: use AdditiveDual,
    lam <- min(maximum, lam + lr mean{c}^+), and mind its maximum, or give slack.
    """

    form: Literal["gated", "rectified"] = "gated"
    slack: float = 0.0
    beta: float = 0.02
    clip: float = 0.2
    value_clip: float = 5.0
    gamma: float = 1.0
    lam: float = 0.95  # of GAE
    token_clamp: float = 50.0
    window: int = 0
    delay: int = 0
    has_multiplier: ClassVar[bool] = True
    needs_critics: ClassVar[bool] = True
    threshold: ClassVar[float] = 0.0  # safe or not is the sign of the cost, prompt by prompt

    def __post_init__(self) -> None:
        if self.form not in ("gated", "rectified"):
            raise ValueError(f"RePO: form {self.form!r} is not 'gated' or 'rectified'")

    def violation(self, costs: Tensor) -> float:
        return costs.double().clamp(min=0).mean().item() - self.slack

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        both = streams(self, rollout, rollout.costs.clamp(min=0) if self.form == "rectified" else rollout.costs)
        policy = (both.reward - multiplier * both.cost) / (1 + multiplier)
        if self.form == "gated":
            policy = torch.where(rollout.costs[:, None] > 0, policy, both.reward)
        return Advantages(policy=policy, reward_returns=both.reward_returns, cost_returns=both.cost_returns)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        args = (logps, rollout.logps, advantages.policy, rollout.responses.mask, self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}
