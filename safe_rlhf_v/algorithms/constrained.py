"""What the online algorithms share, declared once: what they say of themselves, their constraint, their critics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import MEAN, CostMeasure
from safe_rlhf_v.duals import Dual
from safe_rlhf_v.fields import Count


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """Of both critics. value_clip: clip range of their loss."""

    value_clip: float


class Online:
    """What an online algorithm says of itself; each overrides what is otherwise of it.

    words: what it is, for the table of settings. has_multiplier: whether the multiplier enters its advantages. samples:
    of a prompt, the fewest that it can use. needs_demonstrations: whether it learns nothing without the ptx term.
    """

    words: ClassVar[str]
    has_multiplier: ClassVar[bool] = False
    samples: ClassVar[int] = 1
    needs_demonstrations: ClassVar[bool] = False

    @property
    def critics(self) -> CriticSettings | None:
        """None: it needs no values."""
        return None

    def own_dual(self, kind: str | None) -> Mapping[str, Any]:
        """Its own of `policy.dual`: the rule, by its name in `duals.DUALS`, and the first multiplier, where those are
        not named. kind: the rule that the user named."""
        return {"kind": kind or "log"}

    def check(self, dual: Dual, measure: CostMeasure) -> None:
        """Raises ValueError for a rule or a measure that it cannot be trained with; by default it takes all."""


@dataclass(frozen=True, kw_only=True)
class Bounded(Online):
    """A bound on the measured cost, no multiplier: hand `constraint` a `duals.fixed(0)`, or it moves for nothing."""

    threshold: Annotated[float, "Bound d on the measured cost."] = 0.0
    window: Annotated[
        Count, "The bound is checked on the mean cost of so many newest samples; 0: of the last rollout."
    ] = 0

    def constraint(self, dual: Dual, measure: CostMeasure = MEAN, patience: int = 50) -> Constraint:
        """A new one, for one run."""
        return Constraint(dual=dual, threshold=self.threshold, measure=measure, window=self.window, patience=patience)


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Bounded):
    """The same with a multiplier. Defaults: the code of arXiv 2503.17682."""

    window: Annotated[
        Count, "The multiplier sees the mean cost of so many newest samples; 0: of the last rollout. [code] 128"
    ] = 128
    delay: Annotated[Count, "Rollouts before the multiplier first moves. [code] 1"] = 1
    has_multiplier: ClassVar[bool] = True

    def constraint(self, dual: Dual, measure: CostMeasure = MEAN, patience: int = 50) -> Constraint:
        return replace(super().constraint(dual, measure, patience), delay=self.delay)
