"""The constraint of a run: how far the measured costs stand above a threshold, and the multiplier that this moves.

Shapes: N prompts, G samples of each, B = N*G rows. Signs: cost > 0 is unsafe; violation > 0 raises the multiplier.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safe_rlhf_v import duals
from safe_rlhf_v.cost_measures import MEAN, CostMeasure, Fitted

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Constraint:
    """measure(costs) <= threshold, and the multiplier of `dual`; one object a run, which holds what changes in it.

    window: how many of the newest costs of all ranks the measure is taken of, at least those of the rollout; 0: of
    these alone. delay: rollouts before the multiplier first moves. patience: rollouts that it may stand on a bound
    before a warning, which calls them `every`.
    """

    dual: duals.Dual
    threshold: float = 0.0
    measure: CostMeasure = MEAN
    window: int = 0
    delay: int = 0
    patience: int = 50
    every: str = "steps"
    state: Any = field(init=False)  # of the dual
    costs: deque[float] = field(init=False)  # of the window, oldest first
    observations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ValueError(f"Constraint: patience {self.patience} must be above 0")
        self.state, self.costs = self.dual.init(), deque(maxlen=self.window)
        self.watch = BoundWatch(duals.bound(self.dual), self.patience, duals.floor(self.dual), self.every)
        self._fitted: Fitted | None = None
        self._samples = 1

    @property
    def multiplier(self) -> float:
        return float(self.state.value)

    def observe(self, costs: Tensor, step: int | None = None) -> tuple[float, float]:
        """Once a rollout: the costs of all ranks, (N, G) or (n,) for G = 1. Returns the multiplier, moved, and the
        violation that moved it.

        step: what warnings call this; None counts the rollouts. Raises ValueError for fewer samples of a prompt than
        the measure asks for, or costs that are not finite.
        """
        self._samples = costs.shape[1] if costs.ndim == 2 else 1
        self._refuse_few()
        self.observations += 1
        step = self.observations if step is None else step
        self.costs.extend(costs.flatten().tolist())
        known = torch.tensor(list(self.costs)) if self.window > costs.numel() else costs.flatten()
        self._fitted = self.measure.fit(known)
        violation = _mean(self._fitted, whole_prompts(known, self._samples)) - self.threshold
        if self.observations > self.delay:
            self.state = self.dual.step(self.state, violation)
        if self._fitted.flat and len(known) >= self.window:
            self.watch.see_flat(known, step)
        self.watch.see(self.multiplier, violation, step)
        return self.multiplier, violation

    def measured(self, costs: Tensor) -> Tensor:
        """(B,) terminal costs of this rank's rollout, from its costs; the measure is fitted to what was last observed.

        Raises RuntimeError before anything was observed.
        """
        if self._fitted is None:
            raise RuntimeError("Constraint.measured: observe the costs of all ranks first")
        return self._fitted.measured(costs.view(-1, self._samples)).flatten()

    def statistic(self, costs: Tensor) -> float:
        """What the threshold bounds, of these costs (N, G) alone; nothing changes."""
        return _mean(self.measure.fit(costs.flatten()), costs)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {
            "dual": duals.to_json(self.state),
            "costs": list(self.costs),
            "observations": self.observations,
            "steps_at_bound": self.watch.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError for the state of another rule. All but `dual` may be missing, where it does not matter."""
        self.state = duals.from_json(self.dual, state["dual"])
        self.costs = deque(state.get("costs", ()), maxlen=self.window)
        self.observations, self.watch.steps = state.get("observations", 0), state.get("steps_at_bound", 0)

    def _refuse_few(self) -> None:
        if self._samples < self.measure.samples:
            raise ValueError(
                f"{type(self.measure).__name__} is of the mean cost of a prompt's samples: set num_generations to at "
                f"least {self.measure.samples}, not {self._samples}"
            )


def _mean(fitted: Fitted, costs: Tensor) -> float:
    return fitted.bounded(costs).double().mean().item()


def whole_prompts(costs: Tensor, samples: int) -> Tensor:
    """(n,) costs, those of one prompt together, as (N, G); of a prompt that a window cuts the rest is left out."""
    return costs[len(costs) % samples :].view(-1, samples)


@dataclass
class BoundWatch:
    """Counts the steps in a row at which the multiplier stands on a bound while the constraint is violated, and tells
    of costs that the measure makes all alike.

    maximum, floor: `duals.bound` and `duals.floor` of the rule. every: what a step is, as the warning says it.
    """

    maximum: float
    patience: int
    floor: float = 0.0
    every: str = "steps"
    steps: int = 0
    told_of_flat: bool = False

    def see(self, multiplier: float, violation: float, step: int) -> None:
        """Warn each time `patience` steps have passed on a bound without meeting the constraint."""
        above = math.isfinite(self.maximum) and multiplier >= self.maximum
        self.steps = self.steps + 1 if violation > 0 and (above or multiplier < self.floor) else 0
        if not self.steps or self.steps % self.patience:
            return
        if above:
            log.warning(
                "step %d: the multiplier has stood at its maximum %g for %d %s and the costs still violate the "
                "constraint by %.3g; it may be infeasible for this model. Raise the threshold or the maximum, train "
                "longer, or lower beta.",
                step, self.maximum, self.steps, self.every, violation,
            )  # fmt: skip
        else:
            log.warning(
                "step %d: the multiplier has fallen to %.3g, from where the log rule hardly raises it, and the costs "
                "have violated the constraint for %d %s, now by %.3g: hardly anything holds them back. Use the "
                "additive rule, a smaller lr, or a first multiplier nearer to what the constraint needs.",
                step, multiplier, self.steps, self.every, violation,
            )  # fmt: skip

    def see_flat(self, known: Tensor, step: int) -> None:
        """Warn once where a whole window of costs that differ is measured as one cost: no answer is worse than another.

        A CVaR of few costs is their largest, whatever is answered.
        """
        if self.told_of_flat:
            return
        self.told_of_flat = True
        log.warning(
            "step %d: the measure gives all of %d costs the same value, %.3g, so that no answer is worse than another "
            "and nothing lowers it. For cvar: a smaller alpha, or a window of many times 1 / (1 - alpha) costs.",
            step, len(known), float(known.max()),
        )  # fmt: skip
