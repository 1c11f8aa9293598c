"""Pairs and log-probabilities for tests of the direct algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_rlhf_v.types import Inputs, PairBatch, PairLogps, Responses


def pairs(
    more_helpful: Sequence[int],
    safer: Sequence[int] | None = None,
    rates: Sequence[Sequence[float]] | None = None,
    *,
    rewards: Tensor | None = None,
    costs: Tensor | None = None,
) -> PairBatch:
    """A pair an entry, its responses [4, 1] and [5, 1]; by default the more helpful is the safer, and both are safe."""
    n = len(more_helpful)
    answers = tuple(Responses(ids=torch.tensor([[k, 1]] * n), mask=torch.ones(n, 2).bool()) for k in (4, 5))
    return PairBatch(
        prompts=Inputs(input_ids=torch.ones(n, 2).long(), attention_mask=torch.ones(n, 2), vision=({},) * n),
        responses=(answers[0], answers[1]),
        more_helpful=torch.tensor(more_helpful),
        safer=torch.tensor(more_helpful if safer is None else safer),
        harmless_rate=torch.tensor([[1.0, 1.0]] * n if rates is None else rates),
        rewards=rewards,
        costs=costs,
    )


def logps(ratios: Tensor, mismatched: Tensor | None = None) -> PairLogps:
    """log pi - log ref is `ratios`, (B, 2), against a reference that is not 0; every response has 2 tokens."""
    reference = -torch.arange(1.0, ratios.numel() + 1, dtype=ratios.dtype).view_as(ratios)
    lengths = torch.full_like(ratios, 2)
    return PairLogps(policy=reference + ratios, reference=reference, lengths=lengths, mismatched=mismatched)
