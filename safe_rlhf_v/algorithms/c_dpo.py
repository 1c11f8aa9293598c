"""C-DPO, constrained DPO (arXiv 2403.02475): pairs relabelled by r - lam c, and dual ascent on lam."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from safe_rlhf_v.algorithms.pairs import ranking_metrics, refuse_identical
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.duals import AdditiveDual
from safe_rlhf_v.fields import NonNegative, Positive, Rate
from safe_rlhf_v.types import PairBatch, PairLogps

PATIENCE = 5
"""Moves of the multiplier that it may stand at its maximum before a warning. [ours]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CDPO:
    """DPO on the preferences that r - lam c of the reward and cost model implies; lam <- [lam + lr (E c - d)]_+.

    labels "soft": p(y1 > y0) = sig(r_lam(y1) - r_lam(y0)) weighs both orders, the expectation of the paper's sampled
    label, whose minimiser is pi ~ ref exp((r - lam c) / beta); "hard": the higher r_lam wins, as in relabelling
    [secondary]. E c is of the policy itself: every `dual_steps` optimizer steps it answers `dual_prompts` prompts. The
    paper trains anew for every lam; here training goes on from where it stands [ours].
    """

    words: ClassVar[str] = "cost at or under a bound"
    beta: Annotated[Rate, "Weight of the KL to the reference. [paper] 0.1"] = 0.1
    labels: Annotated[
        Literal["soft", "hard"],
        "soft: both orders, weighed by sig of the difference in r - lambda c; hard: the higher wins.",
    ] = "soft"
    threshold: Annotated[float, "Bound d on the mean cost of the policy's own answers."] = 0.0
    multiplier: Annotated[NonNegative, "First lambda."] = 1.0
    dual_lr: Annotated[NonNegative, "Step size of lambda; 0 keeps it."] = 0.1
    maximum: Annotated[Rate, "Largest lambda."] = 20.0
    dual_steps: Annotated[Positive, "Optimizer steps between two steps of lambda."] = 20
    dual_prompts: Annotated[Positive, "Prompts answered for a step of lambda."] = 64
    max_new_tokens: Annotated[Positive, "Longest of these answers."] = 512
    drops_both_unsafe: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.multiplier > self.maximum:
            raise ValueError(f"multiplier {self.multiplier:g} is above maximum {self.maximum:g}")

    def constraint(self) -> Constraint:
        """A new one, for one run, whose multiplier begins at `multiplier`."""
        dual = AdditiveDual(lr=self.dual_lr, initial=self.multiplier, maximum=self.maximum)
        return Constraint(dual=dual, threshold=self.threshold, patience=PATIENCE, every="moves")

    def at(self, multiplier: float) -> CDPO:
        """The same with another multiplier."""
        return replace(self, multiplier=multiplier)

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """Raises ValueError for pairs of the same tokens, and where the batch holds no scores."""
        refuse_identical(batch)
        if batch.rewards is None or batch.costs is None:
            raise ValueError("CDPO needs the rewards and costs of both responses in the batch")
        value = batch.rewards - self.multiplier * batch.costs  # (B, 2) r_lam
        difference = value[:, 1] - value[:, 0]
        second_wins = torch.sigmoid(difference) if self.labels == "soft" else (difference.sign() + 1) / 2
        ratios = logps.log_ratios
        margin = ratios[:, 1] - ratios[:, 0]  # (B,) of the second over the first
        right, wrong = logsigmoid(self.beta * margin), logsigmoid(-self.beta * margin)
        metrics = ranking_metrics(margin * difference.sign()) | {"multiplier": self.multiplier}
        return -(second_wins * right + (1 - second_wins) * wrong).mean(), metrics
