"""What the loops ask of an algorithm. A loop names no algorithm; an algorithm knows no loop."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from safe_rlhf_v.duals import Dual
from safe_rlhf_v.types import Advantages, PairBatch, PairLogps, Rollout


class OnlineAlgorithm(Protocol):
    """B rows, R response length.

    needs_critics: whether the rollout must hold values. has_multiplier: whether the multiplier enters (where it does
    not, hand the loop `duals.fixed(0)`, or it moves without effect). value_clip: clip range of the critics' loss.
    window: how many of the latest costs the violation is taken of, at least those of the current rollout; 0 for these
    alone.
    delay: rollouts before the multiplier's first step.
    """

    @property
    def needs_critics(self) -> bool: ...

    @property
    def has_multiplier(self) -> bool: ...

    @property
    def value_clip(self) -> float: ...

    @property
    def window(self) -> int: ...

    @property
    def delay(self) -> int: ...

    @property
    def threshold(self) -> float: ...

    def violation(self, costs: Tensor) -> float:
        """How far the costs of all ranks, (N, G) with a row a prompt or (n,), stand above the constraint.

        Above 0 it raises the multiplier.
        """
        ...

    def advantages(self, rollout: Rollout, multiplier: float, violation: float) -> Advantages:
        """violation: the one that the multiplier was just moved by, of the window's costs."""
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
    def dual(self) -> Dual: ...

    @property
    def dual_steps(self) -> int: ...

    @property
    def dual_prompts(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    def at(self, multiplier: float) -> ConstrainedDirectAlgorithm:
        """The same algorithm with this multiplier."""
        ...

    def violation(self, costs: Tensor) -> float:
        """How far the costs, (n,) of all ranks, stand above the constraint."""
        ...
