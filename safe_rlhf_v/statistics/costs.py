"""How a vector of costs behaves beyond its mean. B answers; cost > 0 is unsafe."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from safe_rlhf_v.cost_measures import CVaR
from safe_rlhf_v.statistics.intervals import per_prompt, vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """How much very safe answers pay for unsafe ones in a mean constraint (the concern of RePO, NeurIPS 2025).

    mean_positive, mean_negative: E{c}+ and E{c}-, both >= 0, so mean = mean_positive - mean_negative.
    compensated_mass: min of the two: the unsafe mass that a mean constraint at 0 cannot see.
    cvar: mean of the worst (1 - alpha) share. share_above_tau: share of prompts with P(c > 0 | x) > tau.
    """

    mean: float
    mean_positive: float
    mean_negative: float
    unsafe_share: float
    compensated_mass: float
    cvar: float
    alpha: float
    share_above_tau: float
    tau: float
    n_answers: int
    n_prompts: int


def cvar(costs: ArrayLike, alpha: float = 0.9) -> float:
    """Mean of the worst (1 - alpha) share of `costs` (B,), as the measure that a threshold can bound."""
    array = torch.from_numpy(vector(costs, "costs"))
    return float(CVaR(alpha).fit(array).bounded(array).mean())


def compensation(
    costs: ArrayLike, prompts: Sequence[Hashable] | None = None, *, alpha: float = 0.9, tau: float = 0.5
) -> Compensation:
    """Compensation statistics of a cost vector (B,). prompts: id of each answer's prompt, for P(c > 0 | x)."""
    array = vector(costs, "costs")
    positive, negative = float(np.maximum(array, 0).mean()), float(np.maximum(-array, 0).mean())
    unsafe = np.array(list(per_prompt(array > 0, prompts).values()))
    return Compensation(
        mean=float(array.mean()),
        mean_positive=positive,
        mean_negative=negative,
        unsafe_share=float((array > 0).mean()),
        compensated_mass=min(positive, negative),
        cvar=cvar(array, alpha),
        alpha=alpha,
        share_above_tau=float((unsafe > tau).mean()),
        tau=tau,
        n_answers=array.size,
        n_prompts=unsafe.size,
    )
