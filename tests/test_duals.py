"""Rules of the multiplier, by hand and at their limits."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v.duals import (
    AdditiveDual,
    AugmentedDual,
    LogDual,
    PIDDual,
    ScalarState,
    VectorDual,
    bound,
    fixed,
    floor,
    from_json,
    to_json,
)

AUGMENTED = AugmentedDual(0.1, 1.0, 5.0, rho=0.5)
RULES = [LogDual(0.1, 1.0, 5.0), AdditiveDual(0.1, 1.0, 5.0), AUGMENTED, PIDDual(initial=1.0)]


def test_log_dual_by_hand() -> None:
    # log lam + .1 * .5 * 2: lam = 2 exp(.1)
    dual = LogDual(0.1, 2.0, 20.0)
    assert dual.step(dual.init(), 0.5).value == pytest.approx(2 * math.exp(0.1))


def test_log_dual_is_the_sgd_step_of_the_released_code() -> None:
    # loss = -(J_c - d) exp(log_lam), one SGD step on log_lam
    log_lam = torch.tensor(math.log(3.0), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_lam], lr=0.1)
    dual = LogDual(0.1, 3.0, 100.0)
    state = dual.init()
    for violation in (0.7, -0.4, 0.2):
        optimizer.zero_grad()
        (-violation * log_lam.exp()).backward()
        optimizer.step()
        state = dual.step(state, violation)
    assert state.value == pytest.approx(log_lam.exp().item())


def test_additive_dual_by_hand() -> None:
    dual = AdditiveDual(0.5, 1.0, 2.0)
    assert dual.step(dual.init(), 0.6).value == pytest.approx(1.3)
    assert dual.step(dual.init(), 10.0).value == 2.0
    assert dual.step(dual.init(), -10.0).value == 0.0


def test_augmented_dual_by_hand() -> None:
    # lam 1 + .5 * .4 = 1.2, effective 1.2 + 2 * .4 = 2.0; then lam 1.2 - .5 * .2 = 1.1, effective 1.1 - 2 * .2 = .7
    dual = AugmentedDual(lr=0.5, rho=2.0, initial=1.0, maximum=3.0)
    first = dual.step(dual.init(), 0.4)
    assert (first.base, first.value) == pytest.approx((1.2, 2.0))
    second = dual.step(first, -0.2)
    assert (second.base, second.value) == pytest.approx((1.1, 0.7))
    assert dual.step(dual.init(), 0.9).value == 3.0  # 1.45 + 1.8
    assert dual.step(dual.init(), -0.6).value == 0.0  # .7 - 1.2


@settings(max_examples=30, deadline=None)
@given(violations=st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_augmented_lagrangian_is_pid_control_without_derivative_and_smoothing(violations: list[float]) -> None:
    augmented = AugmentedDual(lr=0.3, rho=0.7, initial=1.0, maximum=5.0)
    pid = PIDDual(kp=0.7, ki=0.3, kd=0.0, smoothing=0.0, initial=1.0, maximum=5.0)
    one, other = augmented.init(), pid.init()
    for violation in violations:
        one, other = augmented.step(one, violation), pid.step(other, violation)
        assert one.value == pytest.approx(other.value, abs=1e-12)


def test_augmented_lagrangian_with_rho_0_is_the_additive_rule() -> None:
    augmented, additive = AugmentedDual(0.1, 1.0, 5.0, rho=0.0), AdditiveDual(0.1, 1.0, 5.0)
    assert augmented.step(augmented.init(), 0.7).value == additive.step(additive.init(), 0.7).value


def test_a_fixed_multiplier_never_moves_and_has_no_bound_to_stand_on() -> None:
    dual = fixed(3.0)
    assert dual.step(dual.init(), 100.0).value == dual.step(dual.init(), -100.0).value == 3.0
    assert bound(dual) == math.inf
    assert [bound(rule) for rule in RULES] == [5.0, 5.0, 5.0, 100.0]
    assert bound(AugmentedDual(lr=0.0, rho=1.0, initial=1.0, maximum=5.0)) == 5.0  # a quadratic penalty still moves


def test_the_log_rule_alone_has_a_floor_from_which_it_hardly_rises() -> None:
    assert [floor(rule) for rule in (LogDual(initial=10.0), LogDual(lr=0.0), *RULES[1:])] == [0.1, 0, 0, 0, 0]
    # d lam = lr violation lam^2: from .1 to .2 at lr .1 and violation 1 takes (1/.1 - 1/.2) / .1 = 50 steps
    dual, steps = LogDual(initial=10.0), 0
    state = ScalarState(floor(dual))
    while state.value < 0.2:
        state, steps = dual.step(state, 1.0), steps + 1
    assert steps == pytest.approx(50, abs=2)


def test_pid_integral_does_not_wind_up_at_the_bound() -> None:
    # 1000 violations of 5 would integrate to 50; held at 2, one step of -250 * .01 takes it back to 0
    dual = PIDDual(kp=0.0, kd=0.0, initial=0.0, maximum=2.0)
    state = dual.init()
    for _ in range(1000):
        state = dual.step(state, 5.0)
    assert (state.value, state.integral) == (2.0, 2.0)
    assert dual.step(state, -250.0).value == 0.0


@pytest.mark.parametrize("dual", RULES)
def test_every_rule_reaches_its_bound_under_a_constraint_that_is_never_met(dual: Any) -> None:
    state = dual.init()
    for _ in range(10_000):
        state = dual.step(state, 1.0)
    assert state.value == dual.maximum == bound(dual)


def test_pid_dual_by_hand() -> None:
    # D = 2: I = 0 + .01 * 2; P = .05 * 2 = .1; derivative = .1 - 0. lam = .1 * .1 + .02 + .01 * .1 = .031
    dual = PIDDual(initial=0.0)
    state = dual.step(dual.init(), 2.0)
    assert state.value == pytest.approx(0.031)
    # D = -1: I = .01; P = .95 * .1 - .05 = .045; derivative = .045 - 0, the oldest known. lam = .0045 + .01 + .00045
    assert dual.step(state, -1.0).value == pytest.approx(0.01495)


def test_pid_derivative_looks_delay_steps_back() -> None:
    dual = PIDDual(kp=0.0, ki=0.0, kd=1.0, delay=2, smoothing=0.0, initial=0.0)
    state, values = dual.init(), []
    for violation in (1.0, 2.0, 4.0, 8.0, 3.0):
        state = dual.step(state, violation)
        values.append(state.value)
    # smoothing 0: ema = violation; minus the one two steps before (0 at the start), never below 0
    assert values == [1.0, 2.0, 3.0, 6.0, 0.0]


def test_pid_derivative_only_raises_the_multiplier() -> None:
    # smoothing 0. D = 1: kp D + kd (1 - 0) = 2; D = .5 after 1: .5, where a negative derivative would give 0
    dual = PIDDual(kp=1.0, ki=0.0, kd=1.0, delay=1, smoothing=0.0, initial=0.0)
    first = dual.step(dual.init(), 1.0)
    assert (first.value, dual.step(first, 0.5).value) == (2.0, 0.5)


@pytest.mark.parametrize("dual", RULES)
def test_violation_zero_leaves_the_multiplier(dual: Any) -> None:
    state = dual.init()
    for _ in range(3):
        state = dual.step(state, 0.0)
    assert state.value == dual.init().value


@pytest.mark.parametrize("dual", RULES)
def test_positive_violation_raises_and_negative_lowers(dual: Any) -> None:
    assert dual.step(dual.init(), 0.5).value > 1.0 > dual.step(dual.init(), -0.5).value


@pytest.mark.parametrize("dual", RULES)
@settings(max_examples=30, deadline=None)
@given(violations=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_multiplier_stays_within_its_bounds(dual: Any, violations: list[float]) -> None:
    state = dual.init()
    for violation in violations:
        state = dual.step(state, violation)
        assert 0.0 <= state.value <= dual.maximum


@pytest.mark.parametrize("dual", RULES)
def test_mistake_10_a_step_scales_with_the_violation(dual: Any) -> None:
    # Adam would move the multiplier by the same amount for both
    small, large = (dual.step(dual.init(), violation).value - 1.0 for violation in (0.001, 0.1))
    assert large / small == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("dual", RULES)
def test_mistake_6_state_survives_json(dual: Any) -> None:
    state = dual.init()
    for violation in (0.3, -0.1, 0.7):
        state = dual.step(state, violation)
    restored = from_json(dual, json.loads(json.dumps(to_json(state))))
    assert restored == state
    assert dual.step(restored, 0.2) == dual.step(state, 0.2)


def test_state_of_another_rule_is_refused() -> None:
    with pytest.raises(TypeError):
        from_json(LogDual(), to_json(PIDDual().init()))


@pytest.mark.parametrize("dual", RULES)
@pytest.mark.parametrize("violation", [math.nan, math.inf])
def test_a_violation_that_is_not_finite_is_an_error(dual: Any, violation: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        dual.step(dual.init(), violation)


@pytest.mark.parametrize(
    ("rule", "initial"), [(LogDual, 0.0), (LogDual, 6.0), (AdditiveDual, -1.0), (AdditiveDual, 6.0)]
)
def test_initial_outside_the_bounds_is_refused(rule: Any, initial: float) -> None:
    with pytest.raises(ValueError, match=f"initial {initial:g}"):
        rule(0.1, initial, 5.0)


def test_published_defaults() -> None:
    assert (LogDual().lr, LogDual().initial, LogDual().maximum) == (0.1, 10.0, 20.0)
    assert (PIDDual().kp, PIDDual().ki, PIDDual().kd, PIDDual().delay) == (0.1, 0.01, 0.01, 10)


def test_log_dual_survives_a_collapse_of_the_costs() -> None:
    dual = LogDual(0.1, 1.0, 5.0)
    state = dual.step(dual.init(), -1e6)
    assert state.value >= 0.0
    assert math.isfinite(dual.step(state, 1.0).value)


def test_vector_dual_by_hand() -> None:
    # 1 + .5 * .4 = 1.2; .1 - 2 * .3 < 0: 0; 3 + 1 * 9, at most 5. Alone, each is what AdditiveDual does.
    dual = VectorDual(lr=(0.5, 2.0, 1.0), initial=(1.0, 0.1, 3.0), maximum=5.0)
    moved = dual.step(dual.init(), (0.4, -0.3, 9.0))
    assert moved.value == pytest.approx((1.2, 0.0, 5.0))
    alone = [
        AdditiveDual(lr, first, 5.0).step(AdditiveDual(lr, first, 5.0).init(), v).value
        for lr, first, v in ((0.5, 1.0, 0.4), (2.0, 0.1, -0.3), (1.0, 3.0, 9.0))
    ]
    assert moved.value == pytest.approx(alone)
    assert from_json(dual, json.loads(json.dumps(to_json(moved)))) == moved


def test_vector_dual_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 rates for 1 multipliers"):
        VectorDual(lr=(1.0, 1.0), initial=(0.0,))
    with pytest.raises(ValueError, match="initial -1"):
        VectorDual(lr=(1.0,), initial=(-1.0,))
    with pytest.raises(ValueError, match="not finite"):
        VectorDual(lr=(1.0,), initial=(0.0,)).step(VectorDual(lr=(1.0,), initial=(0.0,)).init(), (math.nan,))
