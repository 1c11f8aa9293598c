"""Imitation alone: the control where policies imitate demonstrations beside what they are rewarded for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from safe_rlhf_v.algorithms.constrained import Bounded
from safe_rlhf_v.fields import Count
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class Imitation(Bounded):
    """A = 0: no policy gradient, no KL, no multiplier [ours].

    In the same loop with the same number of steps, what is left is the ptx term, the cross-entropy on demonstrations.
    Rewards and costs of its samples are logged, and a violation of `threshold`; nothing follows from them.
    """

    words: ClassVar[str] = "demonstrations alone, a control"
    window: Annotated[
        Count, "The logged violation is of the mean cost of so many newest samples; 0: of the last rollout."
    ] = 0
    needs_demonstrations: ClassVar[bool] = True

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        return Advantages(policy=torch.zeros_like(rollout.logps))

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        """0, with a gradient of 0."""
        return (logps.masked_fill(~rollout.responses.mask, 0.0) * advantages.policy).sum(), {"clip_fraction": 0.0}
