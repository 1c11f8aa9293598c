"""BFPO, bi-factorial preference optimisation (arXiv 2408.15313): one regression for helpfulness and safety."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from safe_rlhf_v.algorithms.pairs import in_order, ranking_metrics, refuse_identical, unsafe
from safe_rlhf_v.fields import Above1, Rate
from safe_rlhf_v.types import PairBatch, PairLogps


@dataclass(frozen=True, slots=True, kw_only=True)
class BFPO:
    """mean (h - (1 / beta) (b1 b3 s_w - b3 s_l - alpha))^2, w the more helpful response, s = 1 if safe [code].

    b3 = 1 / (b1 - 1), so two responses alike in safety differ by s - alpha [code]. With the defaults the target of
    beta h is +1 (w safe, l unsafe), +.5 (both safe), -.5 (both unsafe: the less helpful is preferred), -1 (w unsafe, l
    safe).
    """

    words: ClassVar[str] = "both at once, in one regression"
    # of our choice [ours]: the code takes it from the run's configuration
    beta: Annotated[Rate, "Weight of the KL to the reference. [ours] 0.1"] = 0.1
    b1: Annotated[Above1, "Weight of safety against helpfulness. [code] 3"] = 3.0
    alpha: Annotated[float, "Shift of the target. [code] 0.5"] = 0.5
    drops_both_unsafe: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.b1 > 1:
            raise ValueError(f"BFPO: b1 {self.b1} must be above 1")

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError for pairs of the same tokens."""
        refuse_identical(batch)
        of_preferred, of_other = in_order(logps.log_ratios, batch.more_helpful)
        safe_preferred, safe_other = in_order((~unsafe(batch)).to(of_preferred.dtype), batch.more_helpful)
        b3 = 1 / (self.b1 - 1)
        target = (self.b1 * b3 * safe_preferred - b3 * safe_other - self.alpha) / self.beta  # (B,)
        margin = of_preferred - of_other
        return (margin - target).square().mean(), ranking_metrics(margin) | {"target": target.mean().item()}
