"""P3O, penalized proximal policy optimisation (arXiv 2205.11814): a fixed exact penalty in place of a multiplier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from torch import Tensor

from safe_rlhf_v.algorithms.constrained import Bounded
from safe_rlhf_v.algorithms.two_critics import TwoCritics
from safe_rlhf_v.fields import NonNegative
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class P3O(TwoCritics, Bounded):
    """L = L_r + kappa relu(mean max(rho A_c, clip(rho) A_c) + J_c - d) [secondary, code].

    Exact: where kappa is at least the multiplier of max E[r] - beta KL s.t. E[c] <= d, that is the solution; where it
    is less, the policy goes to ref exp((r - kappa c) / beta) and misses the bound. The KL is in the reward alone
    [ours], so that the penalty is of the cost and of nothing else. Its gradient goes on and off at the bound: the
    policy hovers about it within a step's length. The relu is of the rows of one forward pass: unlike other losses it
    depends on how a minibatch is cut into micro-batches.
    """

    words: ClassVar[str] = "no multiplier, an exact penalty"
    kappa: Annotated[
        NonNegative,
        "Weight of the penalty; the bound is kept where it exceeds the multiplier that would keep it. [code] 20",
    ] = 20.0

    def advantages(self, rollout: Rollout, multiplier: float, violation: float) -> Advantages:
        both = self.streams(rollout, kl_in_cost=False)
        return replace(both.advantages(both.reward), cost=both.cost, violation=violation)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        if advantages.cost is None:
            raise ValueError("P3O: these advantages hold no cost; make them by P3O.advantages")
        mask = rollout.responses.mask
        args = (logps, rollout.logps, advantages.policy, mask, self.clip)
        # max(rho A, clip(rho) A) is minus the min over -A, which is what the surrogate takes and negates
        excess = clipped_surrogate(logps, rollout.logps, -advantages.cost, mask, self.clip) + advantages.violation
        loss = clipped_surrogate(*args) + self.kappa * excess.clamp(min=0)
        return loss, {"clip_fraction": clip_fraction(*args).item(), "penalty": self.kappa * max(0.0, excess.item())}
