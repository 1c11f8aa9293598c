"""GAE and group-relative advantages against the definitions, written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v.advantages import gae, group_relative, leave_one_out, token_stream

T = torch.tensor


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over l of (gamma lam)^l delta_{t+l}, for one response without pads."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_definition(rows: int, width: int, seed: int, gamma: float, lam: float) -> None:
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (rows,)).tolist()
    mask = torch.arange(width) < T(lengths)[:, None]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        want = loop_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(want, abs=1e-9)
        torch.testing.assert_close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert not advantages[i, n:].any() and not returns[i, n:].any()


def test_gae_by_hand() -> None:
    # gamma 1, lam .5; r = (0, 1), v = (2, 4). delta_2 = 1 - 4 = -3; delta_1 = 0 + 4 - 2 = 2; A = (2 - 1.5, -3)
    advantages, returns = gae(T([[0.0, 1.0]]), T([[2.0, 4.0]]), T([[True, True]]), 1.0, 0.5)
    assert advantages.tolist() == [[0.5, -3.0]]
    assert returns.tolist() == [[2.5, 1.0]]


def test_gae_of_one_token_is_reward_minus_value() -> None:
    advantages, returns = gae(T([[3.0]]), T([[1.0]]), T([[True]]))
    assert advantages.item() == 2.0 and returns.item() == 3.0


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 2, 5)
    advantages, returns = gae(rewards, values, torch.ones(2, 5).bool(), 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    torch.testing.assert_close(advantages, returns - values)


def test_mistake_3_pads_change_neither_advantages_nor_returns() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    plain = gae(rewards, values, mask)
    pad = torch.nn.functional.pad
    padded = gae(pad(rewards, (0, 3), value=7.0), pad(values, (0, 3), value=float("nan")), pad(mask, (0, 3)))
    for x, y in zip(plain, padded, strict=True):
        assert torch.equal(x, y[:, :4]) and not y[:, 4:].any()


def test_gae_carries_no_gradient() -> None:
    values = torch.randn(1, 3, requires_grad=True)
    assert not any(x.requires_grad for x in gae(torch.randn(1, 3), values, torch.ones(1, 3).bool()))


def test_gae_refuses_a_token_after_a_pad() -> None:
    with pytest.raises(ValueError, match="right-padded"):
        gae(torch.zeros(1, 3), torch.zeros(1, 3), T([[True, False, True]]))


def test_token_stream_by_hand() -> None:
    # per-token .1 each, the score on the last token, everything clamped to +-50, nothing on pads
    mask = T([[True, True, False], [True, False, False]])
    stream = token_stream(T([2.0, -80.0]), torch.full((2, 3), 0.1), mask)
    torch.testing.assert_close(stream, T([[0.1, 2.1, 0.0], [-50.0, 0.0, 0.0]]))


def test_group_relative_by_hand() -> None:
    # group (1, 3): mean 2, sigma 1 -> (-1, 1). group (0, 4): sigma 2 -> (-1, 1)
    scores = T([1.0, 3.0, 0.0, 4.0])
    assert group_relative(scores, 2).tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert group_relative(scores, 2, scale=False).tolist() == [-1.0, 1.0, -2.0, 2.0]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6])
@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_equal_scores_gives_exactly_zero(value: float, scale: bool) -> None:
    assert group_relative(torch.full((7,), value), 7, scale).tolist() == [0.0] * 7


def test_a_group_of_one_gives_zero() -> None:
    assert group_relative(T([5.0, -2.0]), 1).tolist() == [0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000), st.floats(0.1, 100), st.floats(-10, 10))
def test_group_relative_is_standardised_and_knows_no_scale(
    n: int, g: int, seed: int, factor: float, shift: float
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(n * g, dtype=torch.float64)
    z = group_relative(scores, g)
    assert z.view(n, g).mean(1).tolist() == pytest.approx([0.0] * n, abs=1e-9)
    assert z.view(n, g).square().mean(1).tolist() == pytest.approx([1.0] * n)
    torch.testing.assert_close(group_relative(factor * scores + shift, g), z)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000))
def test_leave_one_out_equals_the_loop_and_the_centred_form_times_g_over_g_minus_1(n: int, g: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(n * g, dtype=torch.float64)
    got = leave_one_out(scores, g)
    for i, score in enumerate(scores.tolist()):
        others = [scores[j].item() for j in range(i // g * g, i // g * g + g) if j != i]
        assert got[i].item() == pytest.approx(score - sum(others) / (g - 1), abs=1e-12)
    torch.testing.assert_close(got, group_relative(scores, g, scale=False) * g / (g - 1))


def test_leave_one_out_needs_another() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(3), 1)


def test_groups_do_not_mix() -> None:
    first = group_relative(T([1.0, 2.0, 100.0, 200.0]), 2)
    assert torch.equal(first[:2], group_relative(T([1.0, 2.0]), 2))


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        group_relative(torch.zeros(5), 2)
