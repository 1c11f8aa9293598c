"""Group-relative constrained optimisation [ours]: GRPO (arXiv 2402.03300) with a Lagrangian, no critics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from safe_rlhf_v.advantages import group_relative
from safe_rlhf_v.algorithms.constrained import Lagrangian
from safe_rlhf_v.fields import NonNegative, Rate
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate, reference_kl
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class GroupLag(Lagrangian):
    """A = (Z_r - lam Z_c) / (1 + lam), Z the score standardised within the prompt's group, the same for every token.

    Advantages are combined, not scores: standardising r - lam c would undo the multiplier's scale. The KL to the
    reference is a penalty in the loss (k3 estimator), beta as in GRPO. scale=False leaves sigma out: RLOO's baseline
    but for the factor (G - 1) / G, see `leave_one_out`.

    The gradient of k3, at samples of pi, is that of KL(ref || pi), not of KL(pi || ref): with scale=False it converges
    to pi = beta ref / (nu - s), s = (r - lam c) / (1 + lam), nu such that pi sums to 1, and not to ref exp(s / beta).
    """

    words: ClassVar[str] = "GRPO with a multiplier, no critics"
    beta: Annotated[NonNegative, "Weight of the KL to the reference, in the loss. arXiv 2402.03300 section 4.2"] = 0.04
    clip: Annotated[Rate, "Clip range of the policy ratio."] = 0.2
    scale: Annotated[bool, "Divide by the group's standard deviation (GRPO); false only centres (RLOO)."] = True
    samples: ClassVar[int] = 2

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        """Raises ValueError for groups of one: without a second sample there is nothing to compare with."""
        if rollout.group_size < 2:
            raise ValueError("GroupLag compares samples of one prompt: set num_generations to at least 2")
        reward = group_relative(rollout.rewards, rollout.group_size, self.scale)  # (B,)
        cost = group_relative(rollout.costs, rollout.group_size, self.scale)
        scalar = (reward - multiplier * cost) / (1 + multiplier)
        return Advantages(policy=scalar[:, None] * rollout.responses.mask)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        mask = rollout.responses.mask
        args = (logps, rollout.logps, advantages.policy, mask, self.clip)
        loss = clipped_surrogate(*args)
        if self.beta:
            loss = loss + self.beta * reference_kl(logps, rollout.ref_logps, mask)
        return loss, {"clip_fraction": clip_fraction(*args).item()}
