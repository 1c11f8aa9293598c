"""What the loops ask of an algorithm. A loop names no algorithm; an algorithm knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from safe_rlhf_v.algorithms.constrained import CriticSettings
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import CostMeasure
from safe_rlhf_v.duals import Dual
from safe_rlhf_v.types import Advantages, PairBatch, PairLogps, Rollout


class OnlineAlgorithm(Protocol):
    """B rows, R response length. `constrained.Online` has an answer to all but the last three.

    has_multiplier: whether the multiplier enters (where it does not, hand `constraint` a `duals.fixed(0)`, or it moves
    without effect). critics: their settings, where the rollout must hold values; None where it need not. samples: of a
    prompt, the fewest that it can use. needs_demonstrations: whether it learns nothing without the ptx term.
    """

    @property
    def has_multiplier(self) -> bool: ...

    @property
    def samples(self) -> int: ...

    @property
    def needs_demonstrations(self) -> bool: ...

    def own_dual(self, kind: str | None) -> Mapping[str, Any]:
        """Its own of the multiplier's rule, where the user names none, or names the rule `kind` and no more."""
        ...

    def check(self, dual: Dual, measure: CostMeasure) -> None:
        """Raises ValueError for a rule or a measure that it cannot be trained with."""
        ...

    @property
    def critics(self) -> CriticSettings | None: ...

    def constraint(self, dual: Dual, measure: CostMeasure = ..., patience: int = ...) -> Constraint:
        """A new constraint, for one run. patience: steps on a bound before a warning."""
        ...

    def advantages(self, rollout: Rollout, multiplier: float, violation: float) -> Advantages:
        """rollout: with measured costs. violation: the one that the multiplier was just moved by."""
        ...

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        """logps: (B, R) with gradient. Returns the loss to minimise and what to log."""
        ...


class DirectAlgorithm(Protocol):
    """What the direct (offline) trainer asks of an algorithm on pairs: DPO and its neighbours.

    drops_both_unsafe: pairs of two unsafe responses are left out when loading. needs_scores: whether the batch must
    hold rewards and costs. needs_mismatched: whether the log-probabilities must hold `mismatched`.
    """

    @property
    def drops_both_unsafe(self) -> bool: ...

    @property
    def needs_scores(self) -> bool: ...

    @property
    def needs_mismatched(self) -> bool: ...

    def loss(self, logps: PairLogps, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss to minimise, a scalar, and what to log."""
        ...


class ConstrainedDirectAlgorithm(DirectAlgorithm, Protocol):
    """One with a multiplier, which the trainer moves on the mean cost of the policy's own answers.

    Every `dual_steps` optimizer steps the policy answers `dual_prompts` prompts in at most `max_new_tokens` tokens.
    """

    @property
    def dual_steps(self) -> int: ...

    @property
    def dual_prompts(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    def at(self, multiplier: float) -> ConstrainedDirectAlgorithm:
        """The same algorithm with this multiplier."""
        ...

    def constraint(self) -> Constraint:
        """A new constraint, for one run."""
        ...
