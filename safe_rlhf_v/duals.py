"""Rules for the Lagrange multiplier: pure steps on small states. violation > 0 raises the multiplier.

Each is plain gradient ascent on a scalar. Never an adaptive optimiser: Adam divides the gradient by its own size, so
every step would be as large as any other, however small the violation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Protocol

from safe_rlhf_v.fields import NonNegative, Positive, Rate, ShareBelow1


class State(Protocol):
    """What a rule carries from step to step; `value` is the multiplier."""

    @property
    def value(self) -> float: ...


class Dual(Protocol):
    """A rule for the multiplier."""

    def init(self) -> Any: ...

    def step(self, state: Any, violation: float) -> Any: ...


@dataclass(frozen=True, slots=True)
class ScalarState:
    """The multiplier and nothing else."""

    value: float


@dataclass(frozen=True, slots=True)
class PIDState:
    """Multiplier, integral term, smoothed violation, and the last `delay` smoothed violations, oldest first."""

    value: float
    integral: float
    smoothed: float
    history: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "history", tuple(self.history))


def to_json(state: Any) -> dict[str, Any]:
    """A state as plain JSON values."""
    return asdict(state)


def from_json(dual: Dual, data: Mapping[str, Any]) -> Any:
    """The state that `to_json` wrote, for the same rule. Raises TypeError when the fields are another rule's."""
    return type(dual.init())(**data)


def _check_violation(violation: float) -> float:
    if not math.isfinite(violation):
        raise ValueError(f"violation is {violation}; the costs it was taken from are not finite")
    return float(violation)


def _check_bounds(initial: float, maximum: float) -> None:
    if initial < 0:
        raise ValueError(f"initial {initial:g} must not be below 0")
    if initial > maximum:
        raise ValueError(f"initial {initial:g} is above maximum {maximum:g}")


@dataclass(frozen=True, slots=True)
class Ascent:
    """What the rules that climb by a step size share."""

    lr: Annotated[NonNegative, "Step size of log, additive and augmented. [code] 0.1"] = 0.1
    initial: Annotated[NonNegative, "First multiplier of all but pid; the only one of fixed."] = 10.0
    maximum: Annotated[Rate, "Budget bound: largest multiplier of log, additive and augmented. [code] 20"] = 20.0

    def __post_init__(self) -> None:
        _check_bounds(self.initial, self.maximum)


@dataclass(frozen=True, slots=True)
class LogDual(Ascent):
    """log lam <- log lam + lr * violation * lam, at most log maximum. Defaults: arXiv 2503.17682 [code].

    Text Safe RLHF (arXiv 2310.12773): initial 1, maximum 5. The multiplier stays above 0, and moves ever more slowly
    as it falls.
    """

    def __post_init__(self) -> None:
        Ascent.__post_init__(self)
        if not self.initial:
            raise ValueError("initial 0: initial must be above 0 for kind log: the update multiplies it")

    def init(self) -> ScalarState:
        return ScalarState(self.initial)

    def step(self, state: ScalarState, violation: float) -> ScalarState:
        exponent = self.lr * _check_violation(violation) * state.value
        if exponent >= math.log(self.maximum / state.value):
            return ScalarState(self.maximum)
        return ScalarState(max(state.value * math.exp(exponent), sys.float_info.min))


@dataclass(frozen=True, slots=True)
class AdditiveDual(Ascent):
    """lam <- clip(lam + lr * violation, 0, maximum): the equation printed in arXiv 2503.17682 [paper].

    With lr 0 the multiplier is fixed, which is reward shaping, R - lam C: see `fixed`.
    """

    def init(self) -> ScalarState:
        return ScalarState(self.initial)

    def step(self, state: ScalarState, violation: float) -> ScalarState:
        return ScalarState(min(max(state.value + self.lr * _check_violation(violation), 0.0), self.maximum))


def fixed(value: float) -> AdditiveDual:
    """The multiplier stays at `value`: reward shaping with R - value C; at 0 the cost is ignored."""
    return AdditiveDual(lr=0.0, initial=value, maximum=value)


def bound(dual: Any) -> float:
    """What the multiplier cannot rise above; infinity for a rule that has no maximum or never moves."""
    still = getattr(dual, "lr", None) == 0 and getattr(dual, "rho", 0) == 0
    return math.inf if still else float(getattr(dual, "maximum", math.inf))


def floor(dual: Any) -> float:
    """Below this a multiplier hardly rises under its rule; 0 for a rule whose steps do not shrink with it [ours].

    LogDual moves by about lr * violation * lam^2: at a hundredth of its first value it is ten thousand times as slow.
    One step on very safe costs can take it there, and further.
    """
    return dual.initial / 100 if isinstance(dual, LogDual) and dual.lr else 0.0


@dataclass(frozen=True, slots=True)
class AugmentedState:
    """value: the effective multiplier, which the policy sees; base: the one that is integrated."""

    value: float
    base: float


@dataclass(frozen=True, slots=True)
class AugmentedDual(Ascent):
    """Augmented Lagrangian: the policy sees [lam + rho * violation]_+, and lam <- [lam + lr * violation]_+.

    Hestenes, Powell and Rockafellar; Nocedal and Wright, Numerical Optimization, section 17.4, where lr = rho and the
    inner problem is solved to its end. Here the policy moves a little between steps, so lr is a number of its own
    [ours]; both multipliers are at most maximum. It is PID control with kp = rho, ki = lr, kd = 0 and no smoothing.
    """

    rho: Annotated[NonNegative, "Used by augmented: weight of the present violation in the multiplier. [ours]"] = field(
        default=1.0, kw_only=True
    )

    def init(self) -> AugmentedState:
        return AugmentedState(self.initial, self.initial)

    def step(self, state: AugmentedState, violation: float) -> AugmentedState:
        delta = _check_violation(violation)
        base = min(max(state.base + self.lr * delta, 0.0), self.maximum)
        return AugmentedState(min(max(base + self.rho * delta, 0.0), self.maximum), base)


@dataclass(frozen=True, slots=True)
class PIDDual:
    """A PID controller on the violation D, arXiv 2007.03964 algorithm 2; gains and smoothing from its code [code].

    I <- [I + ki D]_+;  P <- ema(D);  Dr = [ema(D) - ema(D) `delay` steps ago]_+;  lam = [kp P + I + kd Dr]_+, at most
    maximum. The derivative is taken of D instead of the cost: they differ by the threshold, which is constant. I is at
    most maximum too [ours]: an integral that went on growing there would hold the multiplier up long after the
    constraint is met.
    """

    kp: Annotated[NonNegative, "Proportional gain. [code] 0.1"] = 0.1
    ki: Annotated[NonNegative, "Integral gain. [code] 0.01"] = 0.01
    kd: Annotated[NonNegative, "Derivative gain. [code] 0.01"] = 0.01
    delay: Annotated[Positive, "Rollouts over which the derivative is taken. [code] 10"] = 10
    smoothing: Annotated[ShareBelow1, "Weight of the past in the running mean. [code] 0.95"] = 0.95
    initial: Annotated[NonNegative, "First multiplier. [code] 0.001"] = 0.001
    maximum: Annotated[Rate, "Largest multiplier. [code] 100"] = 100.0

    def __post_init__(self) -> None:
        _check_bounds(self.initial, self.maximum)
        if self.delay < 1 or not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"PIDDual: delay {self.delay} must be at least 1 and smoothing {self.smoothing} in 0..1")

    def init(self) -> PIDState:
        return PIDState(self.initial, self.initial, 0.0, (0.0,))

    def step(self, state: PIDState, violation: float) -> PIDState:
        delta = _check_violation(violation)
        integral = min(max(0.0, state.integral + self.ki * delta), self.maximum)
        smoothed = self.smoothing * state.smoothed + (1 - self.smoothing) * delta
        derivative = max(0.0, smoothed - state.history[0])
        value = max(0.0, self.kp * smoothed + integral + self.kd * derivative)
        history = (*state.history, smoothed)[-self.delay :]
        return PIDState(min(value, self.maximum), integral, smoothed, history)


DUALS: dict[str, type] = {"log": LogDual, "additive": AdditiveDual, "augmented": AugmentedDual, "pid": PIDDual}
"""The rules by their names in `policy.dual.kind`, beside `fixed`. Those on `Ascent` share its settings; another has a
section of its own, by its name."""


def refuse_one_way(dual: Any) -> None:
    """Raises ValueError for a rule of no use where the violation is never below 0, so that lambda never falls."""
    if isinstance(dual, LogDual):
        raise ValueError(
            "the violation is never below 0, and log lambda only rises, ever faster; use AdditiveDual (dual.kind: "
            "additive) from a small initial, or give slack above 0"
        )
    if isinstance(dual, Ascent) and dual.lr and dual.initial >= dual.maximum:
        raise ValueError(
            f"dual.initial {dual.initial:g} is dual.maximum: the violation is never below 0 and the multiplier never "
            "falls, so it could not move; begin lower, at 0 for example, or use dual.kind: fixed"
        )


@dataclass(frozen=True, slots=True)
class VectorState:
    """Several multipliers; `value` is a tuple, one a constraint."""

    value: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", tuple(self.value))


@dataclass(frozen=True, slots=True)
class VectorDual:
    """AdditiveDual for K constraints at once: lam_k <- clip(lam_k + lr_k * violation_k, 0, maximum).

    Projected subgradient descent on the dual, lam <- [lam - eta u]_+ with u = -violation: arXiv 2505.19387 [paper].
    lr, initial: one a constraint. maximum: of each [ours; the paper has none].
    """

    lr: tuple[float, ...]
    initial: tuple[float, ...]
    maximum: float = math.inf

    def __post_init__(self) -> None:
        if len(self.lr) != len(self.initial):
            raise ValueError(f"VectorDual: {len(self.lr)} rates for {len(self.initial)} multipliers")
        for value in self.initial:
            _check_bounds(value, self.maximum)

    def init(self) -> VectorState:
        return VectorState(self.initial)

    def step(self, state: VectorState, violations: Sequence[float]) -> VectorState:
        moved = zip(state.value, self.lr, map(_check_violation, violations), strict=True)
        return VectorState(tuple(min(max(lam + lr * v, 0.0), self.maximum) for lam, lr, v in moved))
