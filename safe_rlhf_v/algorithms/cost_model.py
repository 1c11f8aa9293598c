"""CM-V, the cost model of Safe RLHF-V (arXiv 2503.17682)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from safe_rlhf_v.algorithms.pairs import in_order, refuse_contradictory, refuse_identical
from safe_rlhf_v.fields import NonNegative
from safe_rlhf_v.losses import cost_loss
from safe_rlhf_v.types import PairBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Which response is safer, and on which side of 0 each stands: cost > 0 is unsafe."""

    sign_weight: Annotated[
        NonNegative, "Weight of the term that ties the sign of the cost to safe / unsafe. [code] 1"
    ] = 1.0
    regularization: Annotated[NonNegative, "Weight of the mean squared score. [code] 0.001"] = 0.001
    allow_contradictory: Annotated[bool, "Learn from pairs whose safer response has the lower harmless rate."] = False

    def loss(self, scores: Tensor, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """scores: (B, 2) costs in data-set order. Metrics: ranking accuracy, sign accuracy of graded responses.

        Raises ValueError for a pair of the same tokens, and, unless allowed, for a pair whose safer response has the
        lower harmless_rate.
        """
        refuse_identical(batch)
        if not self.allow_contradictory:
            refuse_contradictory(batch)
        safer, unsafer = in_order(scores, batch.safer)
        signs = -batch.harmless_rate.to(scores.dtype)  # (B, 2)
        safer_sign, unsafer_sign = in_order(signs, batch.safer)
        metrics = {"accuracy": (unsafer > safer).float().mean().item(), "score": scores.mean().item()}
        graded = signs != 0
        if bool(graded.any()):
            metrics["sign_accuracy"] = (torch.sign(scores) == torch.sign(signs))[graded].float().mean().item()
        loss = cost_loss(unsafer, safer, unsafer_sign, safer_sign, self.sign_weight, self.regularization)
        return loss, metrics
