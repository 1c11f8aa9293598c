"""MM-DPO (arXiv 2502.10391): pairs of a wider reward margin pull harder, and a share of imitation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from safe_rlhf_v.algorithms.pairs import in_order, ranking_metrics, refuse_identical
from safe_rlhf_v.fields import NonNegative, Rate
from safe_rlhf_v.types import PairBatch, PairLogps


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDPO:
    """mean -log sig(beta_i h) + sft_weight * (minus the log-probability a token of the more helpful response).

    beta_i = beta (1 + w (1 - exp(-k margin))), margin = reward of the more helpful - reward of the other [secondary].
    Where the reward model disagrees with the label the margin counts as 0 [ours]: beta_i is never below beta.
    """

    words: ClassVar[str] = "weighed by reward margins"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] 0.1"] = 0.1
    w: Annotated[NonNegative, "How much more a wide reward margin counts. [secondary] 0.5"] = 0.5
    k: Annotated[NonNegative, "How fast that share is reached. [secondary] 0.5"] = 0.5
    sft_weight: Annotated[NonNegative, "Weight of imitating the more helpful response. [secondary] 0.25"] = 0.25
    drops_both_unsafe: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = False

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError for pairs of the same tokens, and where the batch holds no rewards."""
        refuse_identical(batch)
        if batch.rewards is None:
            raise ValueError("MMDPO needs the rewards of both responses in the batch")
        of_preferred, of_other = in_order(logps.log_ratios, batch.more_helpful)
        reward_preferred, reward_other = in_order(batch.rewards, batch.more_helpful)
        beta = self.beta * (1 + self.w * (1 - torch.exp(-self.k * (reward_preferred - reward_other).clamp(min=0))))
        imitated, _ = in_order(logps.policy / logps.lengths, batch.more_helpful)  # (B,) a token
        margin = of_preferred - of_other
        loss = -logsigmoid(beta * margin).mean() - self.sft_weight * imitated.mean()
        return loss, ranking_metrics(margin) | {"beta": beta.mean().item()}
