"""DPO, direct preference optimisation (arXiv 2305.18290), on one of the two axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from safe_rlhf_v.algorithms.pairs import Axis, checked_preference, in_order, ranking_metrics
from safe_rlhf_v.fields import Rate
from safe_rlhf_v.types import PairBatch, PairLogps


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """mean -log sig(beta h), eq. 7; h = log pi/ref of the preferred response - log pi/ref of the other.

    axis "more_helpful" is DPO-H, "safer" DPO-S, the baselines of Safe RLHF-V (arXiv 2503.17682). For preferences
    p(y1 > y0) = sig(r1 - r0) the minimiser is pi ~ ref exp(r / beta).
    """

    words: ClassVar[str] = "one preference"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] section 6: 0.1"] = 0.1
    axis: Annotated[Axis, "The preference that is learned: DPO-H or DPO-S."] = "more_helpful"
    allow_contradictory: Annotated[bool, "Learn from pairs whose safer response has the lower harmless rate."] = False
    drops_both_unsafe: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError for a pair of the same tokens, and on "safer" for a contradictory one, unless allowed."""
        preferred = checked_preference(batch, self.axis, self.allow_contradictory)
        of_preferred, of_other = in_order(logps.log_ratios, preferred)
        margin = of_preferred - of_other  # (B,) h
        return -logsigmoid(self.beta * margin).mean(), ranking_metrics(margin)
