"""A random rollout for tests of the online algorithms."""

from __future__ import annotations

import torch

from safe_rlhf_v.types import Inputs, Responses, Rollout


def rollout(
    lengths: tuple[int, ...] = (3, 1, 4, 2),
    *,
    costs: list[float] | None = None,
    group_size: int = 2,
    width: int = 4,
    seed: int = 0,
) -> Rollout:
    """One row a length, padded to `width`; what stands on pads is large, so that any reading of it shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]

    def noise() -> torch.Tensor:
        values = torch.randn(rows, max(max(lengths), 8), generator=generator)[:, :width]
        return torch.where(mask, values, torch.full_like(values, 1e3))

    return Rollout(
        prompts=Inputs(input_ids=torch.ones(rows, 2).long(), attention_mask=torch.ones(rows, 2), vision=({},) * rows),
        responses=Responses(ids=mask.long(), mask=mask),
        logps=-noise().abs(),
        ref_logps=-noise().abs(),
        reward_values=noise(),
        cost_values=noise(),
        rewards=torch.randn(rows, generator=generator),
        costs=torch.tensor(costs) if costs else torch.randn(rows, generator=generator),
        group_size=group_size,
    )
