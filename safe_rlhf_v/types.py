"""What flows between stages. Shapes: N prompts, G samples a prompt, B = N*G rows, P prompt length (left-padded),
R response length (right-padded), H hidden, V vocabulary. Signs: cost > 0 is unsafe; violation > 0 raises lambda.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def _map_tensors(value: Any, f: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {k: _map_tensors(v, f) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_map_tensors(v, f) for v in value)
    if isinstance(value, (Inputs, Responses)):
        return value.to_device_with(f)
    return value


class _Movable:
    """Gives a frozen dataclass of tensors `.to(device)`."""

    __slots__ = ()

    def to_device_with(self, f: Any) -> Any:
        return type(self)(**{x.name: _map_tensors(getattr(self, x.name), f) for x in fields(self)})  # type: ignore[arg-type]

    def to(self: T, device: torch.device | str) -> T:
        return self.to_device_with(lambda t: t.to(device, non_blocking=True))  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs(_Movable):
    """B encoded prompts.

    input_ids, attention_mask: (B, P), left-padded.
    token_extras: every processor key shaped like input_ids, e.g. mm_token_type_ids (B, P); 0 on responses.
    vision: B dicts exactly as the processor gave them for that row alone; joined only at the forward.
    features: B entries, the vision tower's output for that row, where it has been computed already; else None.
    image_keys: B content keys of the row's pictures ('' for none): rows that share one share their vision entries.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    vision: tuple[Mapping[str, Tensor], ...] = ()
    features: tuple[Any, ...] | None = None
    image_keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Sequence[int]) -> Inputs:
        """The given rows, in the given order, repeats allowed."""
        index = torch.as_tensor(rows, device=self.input_ids.device)
        return Inputs(
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            token_extras={k: v[index] for k, v in self.token_extras.items()},
            vision=tuple(self.vision[i] for i in rows),
            features=None if self.features is None else tuple(self.features[i] for i in rows),
            image_keys=tuple(self.image_keys[i] for i in rows) if self.image_keys else (),
        )

    def repeat(self, samples: int) -> Inputs:
        """Each row `samples` times in a row: N prompts to B = N*G rows."""
        return self.select([i for i in range(len(self)) for _ in range(samples)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses(_Movable):
    """ids (B, R), right-padded; mask (B, R) bool, True through EOS. The only mask any loss sees."""

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, rows: Sequence[int]) -> Responses:
        index = torch.as_tensor(rows, device=self.ids.device)
        return Responses(ids=self.ids[index], mask=self.mask[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(_Movable):
    """One batch of experience. logps, ref_logps (B, R); rewards, costs (B,); *_values (B, R) or None without critics.

    Rows of one prompt stand together: row i belongs to prompt i // group_size.
    """

    prompts: Inputs
    responses: Responses
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    costs: Tensor
    reward_values: Tensor | None = None
    cost_values: Tensor | None = None
    group_size: int = 1

    def __len__(self) -> int:
        return self.rewards.shape[0]

    def values_of_both_critics(self) -> tuple[Tensor, Tensor]:
        """reward_values and cost_values, each (B, R). Raises ValueError for a rollout taken without critics."""
        if self.reward_values is None or self.cost_values is None:
            raise ValueError("this rollout holds no values: the algorithm needs both critics (roles with critics=True)")
        return self.reward_values, self.cost_values

    def select(self, rows: Sequence[int]) -> Rollout:
        index = torch.as_tensor(rows, device=self.rewards.device)
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        return Rollout(
            prompts=self.prompts.select(rows),
            responses=self.responses.select(rows),
            logps=self.logps[index],
            ref_logps=self.ref_logps[index],
            rewards=self.rewards[index],
            costs=self.costs[index],
            reward_values=pick(self.reward_values),
            cost_values=pick(self.cost_values),
            group_size=self.group_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch(_Movable):
    """B prompts with two responses each, in data-set order.

    more_helpful, safer: (B,) long, 0 or 1. harmless_rate: (B, 2) float in -3..3 (+1 / -1 where ungraded).
    rewards, costs: (B, 2) of the reward and cost model, where an algorithm asks for them.
    """

    prompts: Inputs
    responses: tuple[Responses, Responses]
    more_helpful: Tensor
    safer: Tensor
    harmless_rate: Tensor
    rewards: Tensor | None = None
    costs: Tensor | None = None

    def __len__(self) -> int:
        return self.more_helpful.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages(_Movable):
    """What an algorithm made of a rollout. policy (B, R); the critics' targets (B, R), or None without critics.

    For a loss that weighs the cost by itself: cost (B, R), its advantages, and violation, how far the constraint is
    missed.
    """

    policy: Tensor
    reward_returns: Tensor | None = None
    cost_returns: Tensor | None = None
    cost: Tensor | None = None
    violation: float = 0.0

    def select(self, rows: Sequence[int]) -> Advantages:
        """The given rows, in the given order."""
        index = torch.as_tensor(rows, device=self.policy.device)
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        return Advantages(
            policy=self.policy[index],
            reward_returns=pick(self.reward_returns),
            cost_returns=pick(self.cost_returns),
            cost=pick(self.cost),
            violation=self.violation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps(_Movable):
    """Sums over response tokens of log-probabilities, B pairs in data-set order: policy, reference (B, 2).

    `policy` carries the gradient. lengths: (B, 2) response tokens. mismatched: (B, 2) log pi - log ref, without
    gradient, of both responses of another prompt, put to this one; where an algorithm asks for it.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    mismatched: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        """(B, 2) log pi - log ref of each response."""
        return self.policy - self.reference
