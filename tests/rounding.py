"""Runs that sum in another order: what is equal of them, and an AdamW that leaves it so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# The order of a sum changes its last bit, 2^-24 of it, which the models of tiny_models enlarge up to 60,000 times.
ROUNDING = 60_000 * 2**-24  # as a share: 4e-3
# AdamW divides a gradient by its own size: one near 0, whose sign is rounding, moves its weight by a whole step, and
# one such weight in 10,000 is 1 % of the distance moved. With an epsilon of about the gradients' size (norm 1 after
# clipping, 14,000 weights: 1/120) a step follows its gradient, and differs by no greater share than that does.
EPSILON = 1e-2


def smooth_adamw() -> None:
    """In this process, from here on."""
    real = torch.optim.AdamW.__init__
    torch.optim.AdamW.__init__ = lambda self, *args, **kwargs: real(self, *args, **kwargs | {"eps": EPSILON})  # type: ignore[method-assign]


def close(one: Any, other: Any, start: Any = None, path: str = "") -> None:
    """Nested states equal up to the order of sums. start: tensors that `other` began from, where what counts is how
    far it has moved; a key that is not there began at 0."""
    if isinstance(one, torch.Tensor):
        _close_tensors(one, other, 0 if start is None else start, path)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            close(one[key], other[key], (start or {}).get(key), f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, None, f"{path}[{i}]")
    elif isinstance(one, float):
        # abs: terms of size 1 that cancel, as in a policy's loss, leave the last bits of a sum of some hundred
        assert one == pytest.approx(other, rel=ROUNDING, abs=1e-5), path
    else:
        assert one == other, path


def _close_tensors(one: torch.Tensor, other: torch.Tensor, start: Any, path: str) -> None:
    """In L2, not weight by weight: a weight whose gradient nearly cancels has no digits of its own."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype), path
    if not one.is_floating_point():
        assert torch.equal(one, other), path
        return
    distance, size = (one.double() - other.double()).norm().item(), (other.double() - start).norm().item()
    assert distance <= ROUNDING * size, f"{path}: {distance} apart, of {size}"
