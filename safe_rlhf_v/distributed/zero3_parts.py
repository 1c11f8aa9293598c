"""What DeepSpeed ZeRO-3 has cut: a parameter is empty by itself, its rank's part is `ds_tensor`, flat and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def is_cut(tensor: Any) -> bool:
    """Whether this is a parameter that ZeRO-3 has cut."""
    return hasattr(tensor, "ds_id")


@dataclass(frozen=True, slots=True)
class StatePart:
    """The part of an optimizer's state `key` that belongs to a cut parameter."""

    parameter: nn.Parameter
    key: str


def gather(part: Any) -> Tensor:
    """A cut parameter, or a `StatePart`, whole on the device; every rank must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    if isinstance(part, StatePart):
        return safe_get_full_optimizer_state(part.parameter, part.key)  # type: ignore[no-any-return]
    with deepspeed.zero.GatheredParameters([part]):
        return part.detach().clone()  # type: ignore[no-any-return]


def put(parameter: nn.Parameter, whole: Tensor) -> None:
    """Overwrite a parameter that trains with a tensor that every rank holds whole."""
    from deepspeed.utils import safe_set_local_fp32_param

    part = _part_of(whole, parameter)
    parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
    safe_set_local_fp32_param(parameter, part)  # what the optimizer steps on, unless the two are one


def _part_of(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor of the parameter's shape: flat, with zeros behind its end."""
    from deepspeed import comm

    size = parameter.ds_tensor.numel()
    start = comm.get_rank(group=parameter.ds_process_group) * size
    mine = whole.flatten()[start : start + size]
    part = torch.zeros(size, dtype=parameter.ds_tensor.dtype, device=parameter.ds_tensor.device)
    part[: len(mine)] = mine.to(part)
    return part


def optimizer_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The state_dict that `optimizer`, which ZeRO-3 has given flat parts to step on, would have with `parameters`.

    What is of a parameter's shape is a `StatePart`; there is no state before the first step.
    """
    numbers = list(range(len(parameters)))
    groups = [{**group, "params": numbers} for group in optimizer.param_groups]  # a network is one group
    flat: dict[str, Tensor] = next(iter(optimizer.state.values()), {})
    entry = lambda p: {k: StatePart(p, k) if v.dim() else v.clone() for k, v in flat.items()}  # noqa: E731
    return {"state": {i: entry(p) for i, p in enumerate(parameters) if flat}, "param_groups": groups}


def load_optimizer_state(zero: Any, parameters: Sequence[nn.Parameter], state: Mapping[str, Any]) -> None:
    """Take up a whole state_dict. zero: DeepSpeed's optimizer around the one that steps.

    A parameter without state there, for it never had a gradient, gets zeros.
    """
    from deepspeed.utils import safe_set_local_optimizer_state

    for group, saved in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    known: dict[str, Tensor] = next(iter(state["state"].values()), {})
    for flat in zero.fp32_partitioned_groups_flat if known else ():
        zero.optimizer.state[flat] = {k: torch.zeros_like(flat) if v.dim() else v.clone() for k, v in known.items()}
    for i, entry in state["state"].items():
        for key, value in entry.items():
            if value.dim():
                safe_set_local_optimizer_state(parameters[i], _part_of(value, parameters[i]), key)
