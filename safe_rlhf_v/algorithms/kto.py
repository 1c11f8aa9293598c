"""KTO, Kahneman-Tversky optimisation (arXiv 2402.01306): single responses, desirable or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from safe_rlhf_v.algorithms.pairs import Axis, checked_preference, unsafe
from safe_rlhf_v.fields import Rate
from safe_rlhf_v.types import PairBatch, PairLogps


@dataclass(frozen=True, slots=True, kw_only=True)
class KTO:
    """Mean over all 2B responses of w (1 - sig(beta (z - z0))) if desirable, w (1 - sig(beta (z0 - z))) if not (eq. 8).

    z = log pi/ref; z0 = KL(pi || ref), taken as max(0, mean of z over responses put to another prompt), without
    gradient, as the paper and TRL do. The paper takes the other responses of the micro-batch; here each pair has its
    fixed partner, so that the reference can be computed once [ours]. Desirable: on "more_helpful" the preferred
    response, on "safer" every safe response, as SACPO's code has it (arXiv 2404.11049) [code].
    """

    words: ClassVar[str] = "one preference, learned from single responses"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] 0.1"] = 0.1
    axis: Annotated[Axis, "Desirable is the more helpful response of a pair, or, on safer, every safe response."] = (
        "more_helpful"
    )
    desirable_weight: Annotated[Rate, "Weight of desirable responses. [paper] 1"] = 1.0
    undesirable_weight: Annotated[Rate, "Weight of the others. [paper] 1 where both are equally many"] = 1.0
    allow_contradictory: Annotated[bool, "Learn from pairs whose safer response has the lower harmless rate."] = False
    drops_both_unsafe: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = True

    def desirable(self, batch: PairBatch) -> Tensor:
        """(B, 2) bool."""
        preferred = checked_preference(batch, self.axis, self.allow_contradictory)
        if self.axis == "safer":
            return ~unsafe(batch)
        return torch.arange(2, device=preferred.device) == preferred[:, None]

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError where the log-probabilities lack `mismatched`, and as DPO for faulty pairs."""
        if logps.mismatched is None:
            raise ValueError("KTO needs PairLogps.mismatched, its estimate of the KL to the reference")
        desirable = self.desirable(batch)
        baseline = logps.mismatched.detach().mean().clamp(min=0)  # z0
        signed = torch.where(desirable, 1.0, -1.0) * (logps.log_ratios - baseline)  # (B, 2)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        metrics = {"accuracy": (signed > 0).float().mean().item(), "kl": baseline.item()}
        return (weight * (1 - torch.sigmoid(self.beta * signed))).mean(), metrics
