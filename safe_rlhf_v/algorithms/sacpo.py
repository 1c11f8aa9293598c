"""SACPO, stepwise alignment for constrained policy optimisation (arXiv 2404.11049)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.kto import KTO
from safe_rlhf_v.fields import Rate, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class SACPO:
    """DPO on helpfulness, then DPO or KTO on safety with the first stage as start AND reference, at beta' = beta / lam.

    Stage one ends at ref exp(r / beta); stage two, for the safety score g = -c, at stage1 exp(g / beta'), which is
    ref exp((r - lam c) / beta): the constrained optimum for this lam (theorem 1). P-SACPO then takes the weights
    (1 - q) stage1 + q SACPO: q 1 merges nothing. The released code has beta .1 and tries beta' in .1, .05, .025, .01,
    so lam in 1, 2, 4, 10, and q in .25, .5, .75 [code].
    """

    words: ClassVar[str] = "helpfulness, then safety"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] 0.1"] = 0.1
    lam: Annotated[Rate, "Weight of safety: stage two has beta / lam. [code] tries 1, 2, 4, 10"] = 4.0
    first: Annotated[Literal["dpo", "kto"], "Algorithm of the stage on helpfulness."] = "dpo"
    second: Annotated[Literal["dpo", "kto"], "Algorithm of the stage on safety."] = "dpo"
    # the code weighs by desirable / undesirable in the data [code]
    undesirable_weight: Annotated[Rate, "Weight of undesirable responses where a stage is kto."] = 1.0
    q: Annotated[
        Share,
        "P-SACPO: the saved model is (1 - q) stage one + q stage two, weight by weight. [code] tries .25, .5, .75",
    ] = 1.0
    allow_contradictory: Annotated[bool, "Learn from pairs whose safer response has the lower harmless rate."] = False

    def __post_init__(self) -> None:
        if not self.lam > 0 or not 0 <= self.q <= 1:
            raise ValueError(f"SACPO: lam {self.lam} must be above 0 and q {self.q} in 0..1")

    @property
    def multiplier(self) -> float:
        """What the cost weighs against the reward."""
        return self.lam

    def stages(self) -> tuple[DPO | KTO, DPO | KTO]:
        """The algorithms of both stages: helpfulness, then safety."""
        return self._stage(self.first, False), self._stage(self.second, True)

    def _stage(self, kind: str, safety: bool) -> DPO | KTO:
        beta = self.beta / self.lam if safety else self.beta
        axis: Literal["more_helpful", "safer"] = "safer" if safety else "more_helpful"
        if kind == "dpo":
            return DPO(beta=beta, axis=axis, allow_contradictory=self.allow_contradictory)
        weight = self.undesirable_weight
        return KTO(beta=beta, axis=axis, undesirable_weight=weight, allow_contradictory=self.allow_contradictory)


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor], q: float) -> dict[str, Tensor]:
    """(1 - q) first + q second, weight by weight; what is not floating point is the second's. Raises on other names."""
    if first.keys() != second.keys():
        raise ValueError(f"the models to merge hold different weights: {sorted(first.keys() ^ second.keys())[:3]}")
    return {
        name: ((1 - q) * first[name].double() + q * w.double()).to(w.dtype) if w.is_floating_point() else w
        for name, w in second.items()
    }
