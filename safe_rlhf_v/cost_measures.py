"""What the threshold bounds: the mean cost, an upper confidence bound on it, or the mean of its worst share.

A measure maps costs (B,) to costs (B,) of the same policy gradient as the bounded statistic, given the known costs
(n,) of the same policy. mean(measure(known, known)) IS the statistic. So any algorithm whose violation is a mean cost
minus d, and whose advantages are made of costs, works with any measure and knows none; and a measure has no state of
its own, since the known costs are the window that a checkpoint holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class CostMeasure(Protocol):
    """costs: (B,) of this rollout; known: (n,) of all ranks and of the window. Returns (B,)."""

    def __call__(self, costs: Tensor, known: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Mean:
    """E[c]."""

    def __call__(self, costs: Tensor, known: Tensor) -> Tensor:
        return costs


@dataclass(frozen=True, slots=True)
class HighConfidence:
    """E[c] + kappa std[c], HC-RLHF, arXiv 2506.08266: c + kappa (c^2 - 2 c mu) / (2 sigma) [code].

    That is the derivative of the statistic in the policy; kappa (mu^2 + sigma^2) / (2 sigma) is added [ours], which
    changes no gradient and makes the mean the statistic. mu and sigma are those of the known costs. kappa is
    t_{1-delta, n-1} / sqrt(n) for a bound that holds with probability 1 - delta on n held-out prompts.
    """

    kappa: float = 0.1

    def __post_init__(self) -> None:
        if not self.kappa >= 0:
            raise ValueError(f"HighConfidence: kappa {self.kappa} must not be below 0")

    def __call__(self, costs: Tensor, known: Tensor) -> Tensor:
        mean, sigma = known.double().mean(), known.double().std(correction=0)
        if sigma <= 1e-6 * known.abs().max():  # equal costs: no spread to be pessimistic about
            return costs
        spread = ((costs.double() - mean) ** 2 + sigma**2) / (2 * sigma)
        return (costs + self.kappa * spread).to(costs.dtype)


@dataclass(frozen=True, slots=True)
class CVaR:
    """Mean of the worst (1 - alpha) share, min over eta of eta + E{c - eta}^+ / (1 - alpha).

    Rockafellar and Uryasev 2000, theorem 1; as a constraint of a policy: arXiv 1512.01629. eta is the alpha-quantile
    of the known costs, a minimiser. alpha 0 is the mean.
    """

    alpha: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"CVaR: alpha {self.alpha} is outside [0, 1); 0.9 means the worst tenth")

    def __call__(self, costs: Tensor, known: Tensor) -> Tensor:
        if self.alpha == 0:
            return costs
        # the smallest cost with at least a share alpha at or under it
        eta = known.double().sort().values[max(math.ceil(self.alpha * len(known) - 1e-9), 1) - 1]
        return (eta + (costs.double() - eta).clamp(min=0) / (1 - self.alpha)).to(costs.dtype)
