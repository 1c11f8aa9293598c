"""Reward and cost model objectives on pairs in data-set order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safe_rlhf_v.algorithms.cost_model import CostModel
from safe_rlhf_v.algorithms.pairs import identical, in_order
from safe_rlhf_v.algorithms.reward_model import RewardModel
from safe_rlhf_v.losses import cost_loss, reward_loss
from safe_rlhf_v.types import Inputs, PairBatch, Responses


def responses(rows: list[list[int]]) -> Responses:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Responses(ids=ids, mask=torch.arange(width) < torch.tensor([[len(row)] for row in rows]))


def batch(more_helpful: list[int], safer: list[int], rates: list[list[float]]) -> PairBatch:
    n = len(safer)
    return PairBatch(
        prompts=Inputs(input_ids=torch.ones(n, 2).long(), attention_mask=torch.ones(n, 2), vision=({},) * n),
        responses=(responses([[4, 1]] * n), responses([[5, 6, 1]] * n)),
        more_helpful=torch.tensor(more_helpful), safer=torch.tensor(safer), harmless_rate=torch.tensor(rates),
    )  # fmt: skip


SCORES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]])
BATCH = batch([1, 0, 1], [0, 1, 1], [[2.0, -3.0], [-1.0, 3.0], [0.0, 1.0]])


def test_in_order_puts_the_preferred_first() -> None:
    preferred, other = in_order(SCORES, torch.tensor([1, 0, 1]))
    assert preferred.tolist() == [2.0, 3.0, 0.25] and other.tolist() == [1.0, -1.0, 0.5]


def test_identical_is_of_tokens_whatever_their_padding() -> None:
    first = responses([[4, 1], [4, 1], [4, 1], [4, 5, 1]])
    second = responses([[4, 1], [4, 1, 1, 0], [5, 1], [4, 5, 1]])  # alike; longer by pad-like ids; other; alike
    noise = replace(second, ids=second.ids.masked_fill(~second.mask, 9))
    assert identical(first, second).tolist() == identical(noise, first).tolist() == [True, False, False, True]


def test_reward_model_ranks_by_helpfulness() -> None:
    loss, metrics = RewardModel().loss(SCORES, BATCH)
    want = reward_loss(torch.tensor([2.0, 3.0, 0.25]), torch.tensor([1.0, -1.0, 0.5]))
    assert loss.item() == pytest.approx(want.item())
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_cost_model_ranks_by_safety_and_signs_by_the_harmless_rate() -> None:
    loss, metrics = CostModel().loss(SCORES, BATCH)
    # safer: columns 0, 1, 1 -> costs 1, -1, .25; unsafer 2, 3, .5; signs are minus the rates
    unsafer, safer = torch.tensor([2.0, 3.0, 0.5]), torch.tensor([1.0, -1.0, 0.25])
    want = cost_loss(unsafer, safer, torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-2.0, -3.0, -1.0]))
    assert loss.item() == pytest.approx(want.item())
    assert metrics["accuracy"] == 1.0
    # graded: rates 2 (cost 1, wrong), -3 (2, right), -1 (3, right), 3 (-1, right), 1 (.25, wrong); rate 0 is left out
    assert metrics["sign_accuracy"] == pytest.approx(3 / 5)


def test_axes_do_not_mix() -> None:
    flipped = replace(BATCH, more_helpful=1 - BATCH.more_helpful)
    assert CostModel().loss(SCORES, flipped)[0].item() == CostModel().loss(SCORES, BATCH)[0].item()
    other = replace(BATCH, safer=1 - BATCH.safer, harmless_rate=-BATCH.harmless_rate)
    assert RewardModel().loss(SCORES, other)[0].item() == RewardModel().loss(SCORES, BATCH)[0].item()


def test_swapping_the_responses_of_every_pair_changes_nothing() -> None:
    swapped = replace(
        BATCH, responses=BATCH.responses[::-1], more_helpful=1 - BATCH.more_helpful, safer=1 - BATCH.safer,
        harmless_rate=BATCH.harmless_rate.flip(1),
    )  # fmt: skip
    for algorithm in (RewardModel(), CostModel()):
        assert algorithm.loss(SCORES.flip(1), swapped)[0].item() == pytest.approx(
            algorithm.loss(SCORES, BATCH)[0].item()
        )


@pytest.mark.parametrize("algorithm", [RewardModel(), CostModel()])
def test_gradient_steps_order_the_scores(algorithm: RewardModel | CostModel) -> None:
    scores = torch.zeros(3, 2, requires_grad=True)
    for _ in range(200):
        loss, metrics = algorithm.loss(scores, BATCH)
        scores.data -= 0.5 * torch.autograd.grad(loss, scores)[0]
    assert metrics["accuracy"] == 1.0 and metrics.get("sign_accuracy", 1.0) == 1.0


@pytest.mark.parametrize("algorithm", [RewardModel(), CostModel()])
def test_mistake_11_a_pair_of_the_same_tokens_is_refused_by_row(algorithm: RewardModel | CostModel) -> None:
    first = responses([[4, 1], [7, 8, 1], [4, 1]])
    second = responses([[5, 1, 0, 0], [7, 8, 1, 0], [4, 4, 1, 9]])
    second = replace(second, mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool())
    with pytest.raises(ValueError, match=r"pairs \[1\] .* same response twice"):
        algorithm.loss(SCORES, replace(BATCH, responses=(first, second)))


def test_mistake_11_a_safer_response_that_is_more_harmful_is_refused_unless_allowed() -> None:
    wrong = replace(BATCH, safer=torch.tensor([0, 0, 1]))  # pair 1: rates -1 and 3, the first called safer
    with pytest.raises(ValueError, match=r"pairs \[1\] .* lower harmless_rate"):
        CostModel().loss(SCORES, wrong)
    assert CostModel(allow_contradictory=True).loss(SCORES, wrong)[0].isfinite()
