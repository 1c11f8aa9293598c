"""RLOO, REINFORCE with a leave-one-out baseline (arXiv 2402.14740), with a Lagrangian [ours]; no critics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from safe_rlhf_v.advantages import leave_one_out
from safe_rlhf_v.algorithms.constrained import Lagrangian
from safe_rlhf_v.fields import NonNegative, Rate
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class RLOOLag(Lagrangian):
    """A = (L_r - lam L_c) / (1 + lam), L the score minus the mean score of the prompt's other samples.

    The whole response is one action: its reward is r - beta (log pi - log ref) summed over its tokens, and the loss
    takes the ratio of whole responses. The KL enters the reward alone, so that the multiplier leaves its weight as it
    is: converged, pi = ref exp((r - lam c) / beta), the solution of max E[r] - beta KL s.t. E[c] <= d. The clip is
    PPO's, for several passes over a rollout; with one pass it is plain REINFORCE, as in the paper.
    """

    words: ClassVar[str] = "RLOO with a multiplier, no critics"
    beta: Annotated[NonNegative, "Weight of the KL to the reference, in the rewards; as TRL. [secondary]"] = 0.05
    clip: Annotated[Rate, "Clip range of the ratio of whole responses."] = 0.2
    samples: ClassVar[int] = 2

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        """Raises ValueError for groups of one: without a second sample there is nothing to compare with."""
        if rollout.group_size < 2:
            raise ValueError("RLOOLag compares samples of one prompt: set num_generations to at least 2")
        mask = rollout.responses.mask
        divergence = (rollout.logps - rollout.ref_logps).masked_fill(~mask, 0.0).sum(1)  # (B,)
        reward = leave_one_out(rollout.rewards - self.beta * divergence, rollout.group_size)
        cost = leave_one_out(rollout.costs, rollout.group_size)
        return Advantages(policy=((reward - multiplier * cost) / (1 + multiplier))[:, None] * mask)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        mask = rollout.responses.mask

        def whole(x: Tensor) -> Tensor:
            return x.masked_fill(~mask, 0.0).sum(1, keepdim=True)  # (B, 1)

        scalar = advantages.policy[:, :1]  # (B, 1), the same at every token
        args = (whole(logps), whole(rollout.logps), scalar, mask.any(1, keepdim=True), self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}
