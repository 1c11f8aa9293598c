"""RePO, rectified policy optimisation (NeurIPS 2025, arXiv 2410.19933): C(x, y) <= 0 for every prompt, not in the mean.

A mean lets very safe replies pay for unsafe ones. max over theta, min over lam >= 0 of E[r - beta KL] - lam E[{c}^+].
The authors' code and listing are not to be had; "rectified penalty {C(x, y)}^+" is the text's [secondary].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from safe_rlhf_v.algorithms.constrained import Online
from safe_rlhf_v.algorithms.two_critics import TwoCritics
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import MEAN, CostMeasure, Form, Rectified
from safe_rlhf_v.duals import Dual, refuse_one_way
from safe_rlhf_v.fields import Count, NonNegative
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class RePO(TwoCritics, Online):
    """A = (A_r - lam A_c) / (1 + lam), A_c of the terminal cost of a form, as `Rectified` measures it; m is `margin`.

    rectified: {c + m}^+, penalty lam E{c + m}^+. d/dtheta E{c + m}^+ = E[{c + m}^+ d log pi], and a critic of that
        stream is a baseline that no answer changes: the policy gradient is that of E r - lam E{c + m}^+, over 1 + lam.
    per_prompt: penalty lam E_x {E_y[c | x] + m}^+ over the G >= 2 samples of a prompt [secondary: the paper's first
        version]; answers of one prompt pay for each other, prompts do not. d/dtheta = E_x 1{E_y[c | x] + m > 0} E_y[c d
        log pi], and the terminal cost is (c + m) 1{mean cost of the prompt's OTHER samples + m > 0} [ours]. That gate
        knows nothing of the answer it weighs, so every prompt's gradient has the exact direction, whatever the
        critic; its weight is P(mean of G - 1 costs + m > 0) in place of the indicator, its one bias, and gone as G
        grows. The violation, mean over prompts of {mean of G costs + m}^+, is too large by Jensen, at most by
        half the standard deviation of that mean.
    gated: the cost c, and A_c = 0 where c + m <= 0 [ours]. NOT the gradient of the penalty: V_c is subtracted on unsafe
        answers alone, a baseline that hangs on the answer. With two answers that differ by dr in reward and dc in cost,
        P(unsafe) = p moves by p (1 - p) (dr - lam dc (1 - p)) / (1 + lam): there is a saddle at 1 - dr / (lam dc), and
        a prompt whose P(unsafe) stands above it is driven to 1, to where the rectified form drives none once
        lam dc > dr. Kept for comparison.

    margin m >= 0 asks for c <= -m: at 0 the optimum lies on the cost model's boundary, among its misses. slack: of the
    violation, mean of what is rectified; without it, it is never below 0 and the multiplier never falls: start it low,
    move it by AdditiveDual, lam <- min(maximum, lam + lr mean{c + m}^+), and mind its maximum. LogDual then only
    rises, ever faster.
    """

    words: ClassVar[str] = "every prompt its own constraint"
    form: Annotated[
        Form,
        "rectified: {c + margin}+ as terminal cost; per_prompt: {mean cost of a prompt's samples + margin}+, needs "
        "num_generations of at least 2; gated: the cost enters unsafe samples only, which is no gradient of any "
        "penalty and can raise the share of unsafe answers.",
    ] = "rectified"
    margin: Annotated[
        NonNegative,
        "m of {c + m}+: costs must lie at or under -m; at 0 the optimum lies on the cost model's boundary, among its "
        "misses. [ours]",
    ] = 0.0
    slack: Annotated[NonNegative, "Mean {c + margin}+ that is let pass; without it the multiplier never falls."] = 0.0
    window: Annotated[
        Count, "The multiplier sees the mean {c + margin}+ of so many newest samples; 0: of the last rollout."
    ] = 0
    delay: Annotated[Count, "Rollouts before the multiplier first moves."] = 0
    has_multiplier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._measure()  # which refuses what makes no sense

    def _measure(self) -> Rectified:
        return Rectified(form=self.form, margin=self.margin)

    def own_dual(self, kind: str | None) -> Mapping[str, Any]:
        kind = kind or "additive"
        return {"kind": kind} | ({"initial": 0.0} if kind in ("additive", "augmented") and not self.slack else {})

    def check(self, dual: Dual, measure: CostMeasure) -> None:
        if measure != MEAN:
            raise ValueError(f"it has a bound for each prompt, and takes no {measure}: use measure.kind: mean")
        if not self.slack:
            refuse_one_way(dual)

    def constraint(self, dual: Dual, measure: CostMeasure = MEAN, patience: int = 50) -> Constraint:
        """Raises ValueError for another measure than the mean: what is bounded is of each prompt, not of all."""
        if measure != MEAN:
            raise ValueError(f"RePO bounds every prompt by itself, and takes no {measure}")
        return Constraint(
            dual=dual, threshold=self.slack, measure=self._measure(), window=self.window, delay=self.delay,
            patience=patience,
        )  # fmt: skip

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        both = self.streams(rollout)
        unsafe = rollout.costs[:, None] + self.margin > 0
        return both.weighed(multiplier, torch.where(unsafe, both.cost, 0.0) if self.form == "gated" else None)
