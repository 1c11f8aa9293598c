"""One batch of experience. N prompts, G samples a prompt, B = N*G rows, R response length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from beavertails_v.schema import Prompt
from safe_rlhf_v.generation.base import Sampling
from safe_rlhf_v.models.roles import Roles
from safe_rlhf_v.scorers import Scorer
from safe_rlhf_v.tensors import masked_mean
from safe_rlhf_v.types import Advantages, Inputs, Responses, Rollout

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Responses with their scores. inputs, responses: B rows; rewards, costs: (B,) float32."""

    inputs: Inputs
    responses: Responses
    rewards: Tensor
    costs: Tensor


@torch.no_grad()
def sample(
    roles: Roles,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    *,
    device: torch.device | str,
    rows_at_once: int | None = None,
) -> Samples:
    """`samples` scored responses of the policy to each of N prompts.

    Pictures are encoded once, for N prompts; generation and all later forwards share the features. rows_at_once bounds
    the rows of one forward pass. Raises ValueError when the scorer's answer is not one reward and one cost a row.
    """
    inputs = roles.prepare(roles.encoder.prompts(prompts).to(device))  # N rows
    responses = roles.generate(inputs, samples, sampling)  # B rows
    inputs = inputs.repeat(samples)
    remaining = (prompt for prompt in prompts for _ in range(samples))

    def score(inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        return scorer(list(islice(remaining, len(responses))), inputs, responses)

    rewards, costs = _by_rows(score, inputs, responses, rows_at_once)
    if rewards.shape != (len(responses),) or costs.shape != (len(responses),):
        shapes = f"rewards {tuple(rewards.shape)} and costs {tuple(costs.shape)}"
        raise ValueError(f"the scorer returned {shapes}; both must be ({len(responses)},), one a response")
    return Samples(inputs=inputs, responses=responses, rewards=rewards.float(), costs=costs.float())


@torch.no_grad()
def collect(
    roles: Roles,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    *,
    critics: bool,
    device: torch.device | str,
    rows_at_once: int | None = None,
) -> Rollout:
    """Sample responses, and look at them as policy, as reference and, if wanted, as both critics."""
    drawn = sample(roles, scorer, prompts, sampling, samples, device=device, rows_at_once=rows_at_once)

    def look(how: Callable[..., Tensor], what: str, **options: float) -> Tensor:
        return _by_rows(lambda i, r: how(i, r, what, **options), drawn.inputs, drawn.responses, rows_at_once)  # type: ignore[no-any-return]

    return Rollout(
        prompts=drawn.inputs,
        responses=drawn.responses,
        logps=look(roles.logps, "policy", temperature=sampling.temperature),
        ref_logps=look(roles.logps, "reference", temperature=sampling.temperature),
        rewards=drawn.rewards,
        costs=drawn.costs,
        reward_values=look(roles.values, "reward") if critics else None,
        cost_values=look(roles.values, "cost") if critics else None,
        group_size=samples,
    )


def _by_rows(look: Callable[[Inputs, Responses], Any], inputs: Inputs, responses: Responses, size: int | None) -> Any:
    """look(...) on at most `size` rows at a time, the answers put together again: a tensor or a tuple of tensors."""
    if size is None or size >= len(responses):
        return look(inputs, responses)
    rows = torch.arange(len(responses)).split(size)
    parts = [look(inputs.select(part.tolist()), responses.select(part.tolist())) for part in rows]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))


def minibatch(rollout: Rollout, advantages: Advantages, rows: Sequence[int]) -> tuple[Rollout, Advantages]:
    """The given rows of both, cut to their longest response: columns that are pads in every row cost time only."""
    rollout, advantages = rollout.select(rows), advantages.select(rows)
    width = max(1, int(rollout.responses.mask.sum(1).max()))
    responses = _cut(rollout.responses, width)
    return _cut(replace(rollout, responses=responses), width), _cut(advantages, width)


def _cut(part: T, width: int) -> T:
    """Every (B, R) tensor of a dataclass to its first `width` columns."""
    tensors = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    wide = {name: x[:, :width] for name, x in tensors.items() if isinstance(x, Tensor) and x.dim() == 2}
    return replace(part, **wide)  # type: ignore[type-var]


def statistics(rollout: Rollout) -> dict[str, float]:
    """What to log of a rollout. kl: mean over responses of the sum over tokens of log pi - log ref, in nats.

    entropy: mean over tokens of -log pi, an unbiased estimate for samples at temperature 1.
    """
    mask = rollout.responses.mask
    log_ratio = (rollout.logps - rollout.ref_logps).masked_fill(~mask, 0.0)  # (B, R)
    return {
        "kl": log_ratio.sum(1).mean().item(),
        "entropy": -masked_mean(rollout.logps, mask).item(),
        "response_length": mask.sum(1).float().mean().item(),
    }
