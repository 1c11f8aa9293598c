"""The guard's losses: values by hand, brute force, gradients, unknown labels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard import losses

LOGITS = torch.tensor([[0.3, -1.2, 2.0], [-0.7, 0.1, 0.4], [1.5, 0.0, -3.0]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_zero_logits_by_hand() -> None:
    # every factor is 1/2: P(>= 1, 2, 3) = 1/2, 1/4, 1/8, so P = 1/2, 1/4, 1/8, 1/8
    zero = torch.zeros(1, 3)
    assert losses.severity_at_least(zero)[0].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert losses.severity_probabilities(zero)[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    for level, p in enumerate([0.5, 0.25, 0.125, 0.125]):
        nll = losses.severity_nll(zero, torch.tensor([level]), torch.tensor([int(level > 0)]))
        assert nll.item() == pytest.approx(-math.log(p))


def test_nll_is_minus_log_of_the_probabilities() -> None:
    """Brute force: each row's own loop of products."""
    for row in LOGITS:
        a, b, c = (sigmoid(x) for x in row.tolist())
        expected = [1 - a, a * (1 - b), a * b * (1 - c), a * b * c]
        assert losses.severity_probabilities(row[None])[0].tolist() == pytest.approx(expected)
        for level in range(4):
            nll = losses.severity_nll(row[None], torch.tensor([level]), torch.tensor([int(level > 0)]))
            assert nll.item() == pytest.approx(-math.log(expected[level]))


def test_unsafe_without_a_level_only_teaches_that_it_is_at_least_minor() -> None:
    logits = LOGITS.clone().requires_grad_()
    nll = losses.severity_nll(logits, torch.full((3,), -1), torch.tensor([1, 0, -1]))
    # row 0: -log sigmoid(0.3); rows 1 (safe, which the labels would give level 0) and 2 say nothing
    assert nll.tolist() == pytest.approx([-math.log(sigmoid(0.3)), 0.0, 0.0])
    nll.sum().backward()
    # d/dx -log sigmoid(x) = sigmoid(x) - 1 = -0.42556
    assert logits.grad[0].tolist() == pytest.approx([sigmoid(0.3) - 1, 0.0, 0.0])
    assert logits.grad[1:].abs().max() == 0


def test_mean_counts_only_labelled_rows() -> None:
    severity, unsafe = torch.tensor([2, -1, -1]), torch.tensor([1, -1, 1])
    each = losses.severity_nll(LOGITS, severity, unsafe)
    assert losses.severity_loss(LOGITS, severity, unsafe) == pytest.approx(float(each[0] + each[2]) / 2)


def test_gradients_are_right() -> None:
    logits = LOGITS.clone().requires_grad_()
    severity, unsafe = torch.tensor([3, 0, -1]), torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda z: losses.severity_loss(z, severity, unsafe), (logits,))
    labels = torch.tensor([[1, 0, -1], [-1, -1, -1], [0, 1, 1]])
    assert torch.autograd.gradcheck(lambda z: losses.category_loss(z, labels), (logits,))


def test_no_label_at_all_gives_zero_and_a_zero_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    unknown = torch.full((3,), -1)
    total = (
        losses.severity_loss(logits, unknown, unknown)
        + losses.category_loss(logits, torch.full((3, 3), -1))
        + losses.unsafe_loss(logits[:, :2], unknown, torch.tensor([True, False, True]))
    )
    total.backward()
    assert total.item() == 0 and logits.grad.abs().max() == 0


finite = st.floats(-80, 80, allow_nan=False)


@given(st.lists(finite, min_size=3, max_size=3))
def test_monotone_for_any_logits(row: list[float]) -> None:
    logits = torch.tensor([row])
    at_least, each = losses.severity_at_least(logits)[0], losses.severity_probabilities(logits)[0]
    assert 1 >= at_least[0] >= at_least[1] >= at_least[2] >= 0
    assert each.sum().item() == pytest.approx(1, abs=1e-5) and (each >= 0).all()
    assert each[2:].sum().item() == pytest.approx(at_least[1].item(), abs=1e-6)


def test_unsafe_loss_takes_the_rows_own_head() -> None:
    logits = torch.tensor([[2.0, -9.0], [-9.0, 1.0]])
    # query row, unsafe: -log sigmoid(2) = 0.126928; response row, safe: -log sigmoid(-1) = 1.313262
    loss = losses.unsafe_loss(logits, torch.tensor([1, 0]), torch.tensor([False, True]))
    assert loss.item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-6)


def test_category_loss_by_hand() -> None:
    # softplus(-1) + softplus(0) = 0.313262 + 0.693147; the unknown one and the unknown row count for nothing
    logits = torch.tensor([[1.0, 0.0, 5.0], [3.0, 3.0, 3.0]])
    labels = torch.tensor([[1, 0, -1], [-1, -1, -1]])
    assert losses.category_loss(logits, labels).item() == pytest.approx(1.006409, abs=1e-6)
