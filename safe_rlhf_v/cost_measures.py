"""What the threshold bounds: the mean cost, an upper bound on it, the mean of its worst share, or what is above 0.

A measure is fitted once a rollout to the known costs of the policy, and gives two functions of costs: what stands at
the end of a response in place of its cost, of the same policy gradient as the bounded statistic, and what the statistic
is the mean of. So an algorithm whose advantages are made of costs works with any measure and knows none; and a measure
has no state of its own, since the known costs are the window that a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from safe_rlhf_v.advantages import leave_one_out
from safe_rlhf_v.fields import NonNegative, ShareBelow1


class Fitted(NamedTuple):
    """A measure that knows the costs of the window. N prompts, G samples each.

    measured: (N, G) costs to (N, G) terminal costs. bounded: (N, G) costs to what the threshold bounds the mean of,
    (N, G) or (N,). flat: whether all known costs are measured alike though they differ, so that no answer is worse than
    another.
    """

    measured: Callable[[Tensor], Tensor]
    bounded: Callable[[Tensor], Tensor]
    flat: bool = False


class CostMeasure(Protocol):
    """samples: of a prompt, the fewest that it can be taken of; above 1 it is of the prompt's mean. words: its name in
    a report; None for the mean cost.
    """

    @property
    def samples(self) -> int: ...

    @property
    def words(self) -> str | None: ...

    def fit(self, known: Tensor) -> Fitted:
        """known: (n,) costs of all ranks and of the window."""
        ...


def _same(costs: Tensor) -> Tensor:
    return costs


@dataclass(frozen=True, slots=True)
class Mean:
    """E[c]."""

    samples: ClassVar[int] = 1
    words: ClassVar[str | None] = None

    def fit(self, known: Tensor) -> Fitted:
        return Fitted(_same, _same)


MEAN = Mean()


@dataclass(frozen=True, slots=True)
class HighConfidence:
    """E[c] + kappa std[c], HC-RLHF, arXiv 2506.08266: c + kappa (c^2 - 2 c mu) / (2 sigma) [code].

    That is the derivative of the statistic in the policy; kappa (mu^2 + sigma^2) / (2 sigma) is added [ours], which
    changes no gradient and makes the mean the statistic. mu and sigma are those of the known costs. kappa is
    t_{1-delta, n-1} / sqrt(n) for a bound that holds with probability 1 - delta on n held-out prompts.
    """

    kappa: Annotated[
        NonNegative,
        "Used by high_confidence: standard deviations above the mean; t / sqrt(n) for a test on n prompts. [ours]",
    ] = 0.1
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.kappa >= 0:
            raise ValueError(f"HighConfidence: kappa {self.kappa} must not be below 0")

    @property
    def words(self) -> str:
        return f"mean cost plus {self.kappa:g} standard deviations"

    def fit(self, known: Tensor) -> Fitted:
        mean, sigma = known.double().mean(), known.double().std(correction=0)
        if sigma <= 1e-6 * known.abs().max():  # equal costs: no spread to be pessimistic about
            return MEAN.fit(known)

        def measured(costs: Tensor) -> Tensor:
            spread = ((costs.double() - mean) ** 2 + sigma**2) / (2 * sigma)
            return (costs + self.kappa * spread).to(costs.dtype)

        return Fitted(measured, measured)


@dataclass(frozen=True, slots=True)
class CVaR:
    """Mean of the worst (1 - alpha) share, min over eta of eta + E{c - eta}^+ / (1 - alpha).

    Rockafellar and Uryasev 2000, theorem 1; as a constraint of a policy: arXiv 1512.01629. eta is the alpha-quantile
    of the known costs, a minimiser. alpha 0 is the mean.
    """

    alpha: Annotated[ShareBelow1, "Used by cvar: 0.9 bounds the mean of the worst tenth. [ours]"] = 0.9
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"CVaR: alpha {self.alpha} is outside [0, 1); 0.9 means the worst tenth")

    @property
    def words(self) -> str:
        return f"mean cost of the worst {1 - self.alpha:.0%} of answers"

    def fit(self, known: Tensor) -> Fitted:
        if self.alpha == 0:
            return MEAN.fit(known)
        ordered = known.double().sort().values
        # the smallest cost with at least a share alpha at or under it
        eta = ordered[max(math.ceil(self.alpha * len(known) - 1e-9), 1) - 1]

        def measured(costs: Tensor) -> Tensor:
            return (eta + (costs.double() - eta).clamp(min=0) / (1 - self.alpha)).to(costs.dtype)

        return Fitted(measured, measured, flat=bool(ordered[0] < eta == ordered[-1]))


MEASURES: dict[str, type] = {"mean": Mean, "high_confidence": HighConfidence, "cvar": CVaR}
"""The measures by their names in `policy.measure.kind`."""

Form = Literal["rectified", "gated", "per_prompt"]


@dataclass(frozen=True, slots=True)
class Rectified:
    """E{c + m}^+, m the margin: what stands above -m, for which nothing that stands below pays.

    The terminal cost of form rectified is {c + m}^+. per_prompt: the statistic is E_x {E_y[c | x] + m}^+ over G >= 2
    samples of a prompt, and the terminal cost (c + m) 1{mean cost of the prompt's OTHER samples + m > 0}. gated: the
    terminal cost is the cost itself, to be gated by who makes advantages of it. `RePO` says what each converges to.
    """

    form: Form = "rectified"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"Rectified: form {self.form!r} is not one of {', '.join(map(repr, get_args(Form)))}")
        if not self.margin >= 0:
            raise ValueError(f"Rectified: margin {self.margin} must not be below 0: a cost above 0 is unsafe")

    @property
    def samples(self) -> int:
        return 2 if self.form == "per_prompt" else 1

    @property
    def words(self) -> str:
        what = f"{{c + {self.margin:g}}}+" if self.margin else "{c}+"
        of = "prompt in the mean" if self.form == "per_prompt" else "answer"
        return f"mean {what}, the cost above {-self.margin if self.margin else 0:g} of every {of},"

    def fit(self, known: Tensor) -> Fitted:
        measured = {"rectified": self._above, "gated": _same, "per_prompt": self._where_others_are_above}
        return Fitted(measured[self.form], self._bounded)

    def _above(self, costs: Tensor) -> Tensor:
        return (costs + self.margin).clamp(min=0)

    def _where_others_are_above(self, costs: Tensor) -> Tensor:
        above = costs + self.margin
        of_others = above - leave_one_out(above.flatten(), above.shape[1]).view_as(above)
        return torch.where(of_others > 0, above, 0.0)

    def _bounded(self, costs: Tensor) -> Tensor:
        costs = costs.double()
        return self._above(costs.mean(1) if self.form == "per_prompt" else costs)
