"""Losses against values derived by hand and against explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    cost_loss,
    reference_kl,
    reward_loss,
    token_cross_entropy,
)

T = torch.tensor


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_reward_loss_by_hand() -> None:
    # differences 1 and -1: -log sig = .313262 and 1.313262, mean .813262; mean square (4+1+1+4)/4 = 2.5, times .001
    loss = reward_loss(T([2.0, 1.0]), T([1.0, 2.0]))
    assert loss.item() == pytest.approx(0.8132617 + 0.0025, abs=1e-6)


def test_reward_loss_depends_on_differences_alone_without_regularization() -> None:
    helpful, other = torch.randn(5), torch.randn(5)
    shifted = reward_loss(helpful + 3, other + 3, regularization=0.0)
    assert shifted.item() == pytest.approx(reward_loss(helpful, other, regularization=0.0).item(), abs=1e-6)


def test_cost_loss_by_hand() -> None:
    # unsafer 2 (s = 3), safer -1 (s = -2). ranking -log sig(3) = .0485874; sign -log sig(6) - log sig(2)
    # = .0024757 + .1269280 = .1294037; regularization .001 * (4 + 1) / 2 = .0025
    loss = cost_loss(T([2.0]), T([-1.0]), T([3.0]), T([-2.0]))
    assert loss.item() == pytest.approx(0.0485874 + 0.1294037 + 0.0025, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 3), st.floats(0, 0.1))
def test_cost_loss_equals_the_loop(pairs: int, seed: int, weight: float, regularization: float) -> None:
    torch.manual_seed(seed)
    unsafer, safer = torch.randn(2, pairs, dtype=torch.float64)
    signs = torch.randint(-3, 4, (2, pairs)).double()
    want = 0.0
    for u, s, su, ss in zip(unsafer.tolist(), safer.tolist(), signs[0].tolist(), signs[1].tolist(), strict=True):
        want += -math.log(sig(u - s)) + weight * (-math.log(sig(su * u)) - math.log(sig(ss * s)))
        want += regularization * (u * u + s * s) / 2
    got = cost_loss(unsafer, safer, signs[0], signs[1], weight, regularization)
    assert got.item() == pytest.approx(want / pairs)


def test_cost_sign_of_an_ungraded_response_has_no_gradient() -> None:
    cost = torch.zeros(1, requires_grad=True)
    ranking = torch.autograd.grad(cost_loss(cost, T([5.0]), T([0.0]), T([-1.0]), regularization=0.0), cost)[0]
    without = torch.autograd.grad(cost_loss(cost, T([5.0]), T([0.0]), T([-1.0]), 0.0, regularization=0.0), cost)[0]
    assert torch.equal(ranking, without)


def test_graded_sign_pulls_harder_the_more_harmful() -> None:
    # at cost 0 the gradient of -log sig(s C) is -s / 2
    for s in (1.0, 2.0, 3.0):
        cost = torch.zeros(1, requires_grad=True)
        loss = cost_loss(cost, cost.detach(), T([s]), T([-1.0]), regularization=0.0)
        assert torch.autograd.grad(loss, cost)[0].item() == pytest.approx(-0.5 - s / 2)  # -1/2 from the ranking


def loop_surrogate(logps, old, advantages, mask, clip):  # type: ignore[no-untyped-def]
    rows = []
    for i in range(len(logps)):
        gains = []
        for t in range(logps.shape[1]):
            if mask[i, t]:
                ratio, a = math.exp(logps[i, t] - old[i, t]), float(advantages[i, t])
                gains.append(min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        if gains:
            rows.append(sum(gains) / len(gains))
    return -sum(rows) / len(rows) if rows else 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_clipped_surrogate_equals_the_loop(rows: int, width: int, seed: int, clip: float) -> None:
    torch.manual_seed(seed)
    logps, old, advantages = torch.randn(3, rows, width, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1))
    want = loop_surrogate(logps, old, advantages, mask, clip)
    assert clipped_surrogate(logps, old, advantages, mask, clip).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.5, 2.0, -2.4, False),  # min(3, 1.2 * 2): up enough
        (1.5, -2.0, 3.0, True),  # min(-3, -2.4): going the wrong way is never clipped
        (0.5, 2.0, -1.0, True),  # min(1, 1.6)
        (0.5, -2.0, 1.6, False),  # min(-1, -1.6): down enough
        (1.1, 2.0, -2.2, True),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, has_gradient: bool) -> None:
    logps = T([[math.log(ratio)]], requires_grad=True)
    args = (logps, torch.zeros(1, 1), T([[advantage]]), T([[True]]))
    got = clipped_surrogate(*args)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert (logps.grad.item() != 0.0) == has_gradient
    assert clip_fraction(*args).item() == float(not has_gradient)


def test_on_policy_gradient_is_that_of_the_plain_policy_gradient() -> None:
    logps = torch.randn(2, 3, requires_grad=True)
    advantages, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    clipped_surrogate(logps, logps.detach(), advantages, mask).backward()
    torch.testing.assert_close(logps.grad, -advantages / 6)


def test_mistake_3_pads_reach_neither_loss_nor_gradient() -> None:
    torch.manual_seed(0)
    logps, old, advantages = torch.randn(3, 2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    widened = [torch.nn.functional.pad(x, (0, 2), value=v) for x, v in ((logps, math.inf), (old, 50), (advantages, 9))]
    wide_mask = torch.nn.functional.pad(mask, (0, 2))
    wide = widened[0].requires_grad_()
    loss = clipped_surrogate(wide, widened[1], widened[2], wide_mask)
    loss.backward()
    torch.testing.assert_close(loss, clipped_surrogate(logps, old, advantages, mask))
    assert wide.grad.isfinite().all() and torch.equal(wide.grad[:, 3:], torch.zeros(2, 2))


def test_mistake_4_a_token_of_log_probability_zero_is_a_token() -> None:
    # a certain token has log-probability 0; a mask guessed from log_probs != 0 would drop it and give -1, not -2
    logps = torch.zeros(1, 2, requires_grad=True)
    loss = clipped_surrogate(logps, torch.zeros(1, 2), T([[3.0, 1.0]]), T([[True, True]]))
    loss.backward()
    assert loss.item() == -2.0 and logps.grad.tolist() == [[-1.5, -0.5]]


def test_clipped_value_loss_by_hand() -> None:
    # old 0, return 10. value 7: (7-10)^2 = 9 against clipped 5: 25 -> 25/2. value 3: unclipped, 49/2. Mean 37/2.
    values = T([[7.0], [3.0]])
    loss = clipped_value_loss(values, torch.zeros(2, 1), torch.full((2, 1), 10.0), torch.ones(2, 1).bool())
    assert loss.item() == pytest.approx((25 + 49) / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.1, 2))
def test_clipped_value_loss_equals_the_loop(rows: int, width: int, seed: int, clip: float) -> None:
    torch.manual_seed(seed)
    values, old, returns = torch.randn(3, rows, width, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1))
    means = []
    for i in range(rows):
        errors = []
        for t in range(int(mask[i].sum())):
            v, o, r = values[i, t].item(), old[i, t].item(), returns[i, t].item()
            near = o + min(max(v - o, -clip), clip)
            errors.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
        means.append(sum(errors) / len(errors))
    want = sum(means) / rows
    assert clipped_value_loss(values, old, returns, mask, clip).item() == pytest.approx(want)


def test_reference_kl_is_zero_at_the_reference_and_never_negative() -> None:
    logps, ref, mask = torch.randn(4, 6), torch.randn(4, 6), torch.ones(4, 6).bool()
    assert reference_kl(logps, logps, mask).item() == 0.0
    assert reference_kl(logps, ref, mask).item() > 0.0
    # z = log 2: exp(-z) + z - 1 = .5 + .693147 - 1
    assert reference_kl(T([[math.log(2)]]), T([[0.0]]), T([[True]])).item() == pytest.approx(0.193147, abs=1e-6)


def test_reference_kl_estimates_the_true_divergence() -> None:
    # E over pi of k3 is KL(pi || ref): weigh each token by its probability under pi
    pi, ref = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    expected = sum(pi[i].exp() * reference_kl(pi[i].view(1, 1), ref[i].view(1, 1), T([[True]])) for i in range(5))
    assert expected.item() == pytest.approx((pi.exp() * (pi - ref)).sum().item())


def test_token_cross_entropy_by_hand() -> None:
    # row means of -log p: (1 + 3) / 2 = 2 and 4; mean 3
    logps = T([[-1.0, -3.0], [-4.0, -99.0]])
    assert token_cross_entropy(logps, T([[True, True], [True, False]])).item() == 3.0
