"""What the online algorithms share of their constraint, and their critics, declared once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import MEAN, CostMeasure
from safe_rlhf_v.duals import Dual


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """Of both critics. value_clip: clip range of their loss."""

    value_clip: float


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """A bound on the measured cost, and no multiplier: hand `constraint` a `duals.fixed(0)`, or it moves for nothing.

    threshold: d. window: how many of the newest costs the measure is taken of; 0: those of the last rollout.
    """

    threshold: float = 0.0
    window: int = 0
    has_multiplier: ClassVar[bool] = False

    @property
    def critics(self) -> CriticSettings | None:
        """None: it needs no values."""
        return None

    def constraint(self, dual: Dual, measure: CostMeasure = MEAN, patience: int = 50) -> Constraint:
        """A new one, for one run."""
        return Constraint(dual=dual, threshold=self.threshold, measure=measure, window=self.window, patience=patience)


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Bounded):
    """The same with a multiplier. delay: rollouts before it first moves. Defaults: the code of arXiv 2503.17682."""

    window: int = 128
    delay: int = 1
    has_multiplier: ClassVar[bool] = True

    def constraint(self, dual: Dual, measure: CostMeasure = MEAN, patience: int = 50) -> Constraint:
        return replace(super().constraint(dual, measure, patience), delay=self.delay)
