"""Masks and log-probabilities against loops, by-hand values and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safe_rlhf_v.tensors import last_attended, masked_mean, place_on_last, pool_last, token_logps


def loop_mean(x: torch.Tensor, mask: torch.Tensor) -> float:
    rows = [[v for v, m in zip(r.tolist(), k.tolist(), strict=True) if m] for r, k in zip(x, mask, strict=True)]
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / len(means) if means else 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_masked_mean_equals_the_loop(rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, mask = torch.randn(rows, width, dtype=torch.float64), torch.rand(rows, width) < 0.5
    assert masked_mean(x, mask).item() == pytest.approx(loop_mean(x, mask), abs=1e-12)


def test_masked_mean_weighs_rows_alike_whatever_their_length() -> None:
    # row means (1 + 3) / 2 = 2 and 10; their mean 6. A mean over tokens would be 14 / 3.
    x = torch.tensor([[1.0, 3.0, 99.0], [10.0, 99.0, 99.0]])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()).item() == 6.0


def test_mistake_7_masked_mean_of_nothing_is_zero_not_nan() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_mistake_7_a_row_without_tokens_counts_for_nothing() -> None:
    x = torch.tensor([[4.0, 2.0], [7.0, 7.0]])
    assert masked_mean(x, torch.tensor([[True, True], [False, False]])).item() == 3.0


def test_masked_mean_never_reads_a_pad() -> None:
    x = torch.tensor([[1.0, math.nan], [2.0, math.inf]], requires_grad=True)
    mean = masked_mean(x, torch.tensor([[True, False], [True, False]]))
    mean.backward()
    assert mean.item() == 1.5
    assert x.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]


@pytest.mark.parametrize(
    ("mask", "index"),
    [([1, 1, 0, 0], 1), ([0, 0, 1, 1], 3), ([1, 1, 1, 1], 3), ([0, 1, 0, 0], 1), ([1, 0, 1, 0], 2)],
)
def test_last_attended_on_either_padding(mask: list[int], index: int) -> None:
    assert last_attended(torch.tensor([mask])).tolist() == [index]


def test_last_attended_of_nothing_names_the_row() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        last_attended(torch.tensor([[1, 0], [0, 0]]))


def test_mistake_1_pooling_takes_the_last_token_not_a_pad() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)  # row 0: 0..3, row 1: 4..7
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert pool_last(hidden, mask).flatten().tolist() == [1.0, 7.0]  # position -1 would give 3 and 7


def test_mistake_1_pooling_does_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 3, 5)
    want = hidden[:, 2]
    for left, right in ((0, 4), (4, 0), (2, 3)):
        padded = nn.functional.pad(hidden, (0, 0, left, right), value=9.0)
        mask = nn.functional.pad(torch.ones(1, 3), (left, right))
        assert torch.equal(pool_last(padded, mask), want)


def test_mistake_3_terminal_score_lands_on_the_last_token_not_on_a_pad() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    placed = place_on_last(torch.tensor([5.0, 6.0, 7.0, 8.0]), mask)
    assert placed.tolist() == [[0, 5, 0], [0, 0, 6], [7, 0, 0], [0, 0, 0]]


def reference_logps(hidden: torch.Tensor, head: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return head(hidden).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 1000])
def test_token_logps_and_gradients_equal_the_whole_softmax(chunk_size: int) -> None:
    torch.manual_seed(0)
    head, ids = nn.Linear(4, 11), torch.randint(0, 11, (3, 5))
    hidden = torch.randn(3, 5, 4, requires_grad=True)
    weights = torch.randn(3, 5)
    inputs = (hidden, *head.parameters())
    want = torch.autograd.grad((reference_logps(hidden, head, ids) * weights).sum(), inputs)
    logps = token_logps(hidden, head, ids, chunk_size)
    torch.testing.assert_close(logps, reference_logps(hidden, head, ids))
    for got, wanted in zip(torch.autograd.grad((logps * weights).sum(), inputs), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_token_logps_under_a_mask_form_no_other_logits() -> None:
    """Values and gradients of the asked tokens are those of all; the others are 0 and their states get no gradient."""
    torch.manual_seed(0)
    head, ids = nn.Linear(6, 11, bias=False), torch.randint(0, 10, (3, 5))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    formed: list[int] = []
    head.register_forward_hook(lambda module, args, output: formed.append(output.shape[0]))
    found, gradients = [], []
    for asked in (mask, None):
        hidden = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logps = token_logps(hidden, head, ids, 100, (10,), mask=asked)
        logps[mask].square().sum().backward()
        found.append(logps.detach())
        gradients.append(hidden.grad)
    assert formed == [7, 15]
    torch.testing.assert_close(found[0][mask], found[1][mask])
    assert not found[0][~mask].any()
    torch.testing.assert_close(gradients[0], gradients[1])
    empty = token_logps(torch.randn(2, 3, 6, requires_grad=True), head, ids[:2, :3], mask=torch.zeros(2, 3).bool())
    empty.sum().backward()
    assert not empty.any()


def test_token_logps_takes_a_bare_weight() -> None:
    torch.manual_seed(0)
    head, hidden, ids = nn.Linear(4, 7, bias=False), torch.randn(2, 3, 4), torch.randint(0, 7, (2, 3))
    assert torch.equal(token_logps(hidden, head.weight, ids, 2), token_logps(hidden, head, ids, 2))


def test_token_logps_by_hand() -> None:
    # logits (0, log 3): probabilities 1/4, 3/4. At temperature 2 the odds are sqrt 3 : 1.
    head, hidden = torch.tensor([[0.0], [math.log(3.0)]]), torch.ones(1, 2, 1)
    ids = torch.tensor([[0, 1]])
    assert token_logps(hidden, head, ids, 10).exp().tolist() == [pytest.approx([0.25, 0.75])]
    root = math.sqrt(3.0)
    assert token_logps(hidden, head, ids, 10, temperature=2.0).exp().tolist() == [
        pytest.approx([1 / (1 + root), root / (1 + root)])
    ]


def test_mistake_8_suppressed_tokens_leave_the_softmax() -> None:
    # equal logits over 4 ids, 2 suppressed: the others have 1/2 each, the suppressed 0
    head, hidden = torch.zeros(4, 3), torch.randn(1, 4, 3)
    ids = torch.tensor([[0, 1, 2, 3]])
    assert token_logps(hidden, head, ids, 10, suppress=(1, 3)).exp().tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert token_logps(hidden, head, ids, 10).exp().tolist() == [[0.25] * 4]


def test_mistake_8_suppressed_probabilities_sum_to_one_with_finite_gradients() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 6, 3, requires_grad=True), torch.randn(6, 3)
    hidden_row = hidden[:, :1].expand(1, 6, 3)
    logps = token_logps(hidden_row, head, torch.arange(6)[None], 4, suppress=(2,))
    assert logps.exp().sum().item() == pytest.approx(1.0)
    logps[:, [0, 1, 3]].sum().backward()
    assert hidden.grad.isfinite().all()


def test_token_logps_never_saves_all_logits() -> None:
    vocabulary, chunk = 1000, 4
    hidden, head = torch.randn(2, 16, 8, requires_grad=True), nn.Linear(8, vocabulary)
    largest = [0]

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor is not head.weight and tensor.data_ptr() != head.weight.data_ptr():
            largest[0] = max(largest[0], tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        token_logps(hidden, head, torch.zeros(2, 16, dtype=torch.long), chunk).sum()
    assert largest[0] < chunk * vocabulary  # not even one chunk's logits: they are recomputed


@pytest.mark.parametrize(
    ("options", "what"), [({"chunk_size": 0}, "chunk_size"), ({"temperature": 0.0}, "temperature")]
)
def test_token_logps_refuses_senseless_options(options: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        token_logps(torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.long), **options)


def test_token_logps_refuses_states_that_do_not_match_tokens() -> None:
    with pytest.raises(ValueError, match="one state per token"):
        token_logps(torch.zeros(1, 3, 3), torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.long), 4)
