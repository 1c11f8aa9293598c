"""RM-V, the reward model of Safe RLHF-V (arXiv 2503.17682)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from safe_rlhf_v.algorithms.pairs import in_order, refuse_identical
from safe_rlhf_v.fields import NonNegative
from safe_rlhf_v.losses import reward_loss
from safe_rlhf_v.types import PairBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """Bradley-Terry on which response is more helpful, safety ignored."""

    regularization: Annotated[NonNegative, "Weight of the mean squared score. [code] 0.001"] = 0.001

    def loss(self, scores: Tensor, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """scores: (B, 2) in data-set order. Metrics: ranking accuracy and mean score.

        Raises ValueError for a pair whose two responses are the same tokens.
        """
        refuse_identical(batch)
        helpful, other = in_order(scores, batch.more_helpful)
        metrics = {
            "accuracy": (helpful > other).float().mean().item(),
            "margin": (helpful - other).mean().item(),
            "score": scores.mean().item(),
        }
        return reward_loss(helpful, other, self.regularization), metrics
