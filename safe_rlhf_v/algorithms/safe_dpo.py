"""SafeDPO (arXiv 2505.20065): DPO on relabelled pairs with a safety margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from safe_rlhf_v.algorithms.pairs import in_order, ranking_metrics, refuse_both_unsafe, refuse_identical, unsafe
from safe_rlhf_v.fields import NonNegative, Rate
from safe_rlhf_v.types import PairBatch, PairLogps


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeDPO:
    """mean -log sig(beta h - (u_l - u_w) delta), u = 1 if unsafe, with w the more helpful response [secondary].

    Where w is unsafe and l safe the two are swapped; pairs of two unsafe responses are dropped. delta 0 is DPO on the
    pairs so relabelled; the optimum, a policy that is never unsafe, does not depend on it.
    """

    words: ClassVar[str] = "both at once, unsafe answers below safe ones by a margin"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] 0.1"] = 0.1
    delta: Annotated[NonNegative, "Margin between a safe and an unsafe response. [secondary] 10"] = 10.0
    drops_both_unsafe: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError for pairs of the same tokens or of two unsafe responses. Metrics: swapped, a share."""
        refuse_identical(batch)
        refuse_both_unsafe(batch)
        bad = unsafe(batch)  # (B, 2)
        preferred = torch.where(bad[:, 0] == bad[:, 1], batch.more_helpful, bad[:, 0].long())  # the safe one, if one is
        of_preferred, of_other = in_order(logps.log_ratios, preferred)
        bad_preferred, bad_other = in_order(bad.to(of_preferred.dtype), preferred)
        margin = of_preferred - of_other
        swapped = (preferred != batch.more_helpful).float().mean().item()
        loss = -logsigmoid(self.beta * margin - (bad_other - bad_preferred) * self.delta).mean()
        return loss, ranking_metrics(margin) | {"swapped": swapped}
