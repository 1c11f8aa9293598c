"""Rows into forward passes: those of like length together, within a budget, and fewer when memory runs out.

Shapes: B rows, P prompt length (left-padded), R response length (right-padded).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn.functional import pad

from safe_rlhf_v.models.collation import in_order
from safe_rlhf_v.types import Inputs, Responses

T = TypeVar("T")
log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """Memory runs out with a single row in a pass."""


@dataclass(slots=True, kw_only=True)
class MicroBatches:
    """How rows are spread over forward passes. Sums and means do not depend on it, but for rounding.

    rows, tokens: bounds on the rows of a pass and on its tokens, pads included; None for none. Without a bound all rows
    go together, in their order. A row that is over the bound on tokens by itself is a pass of its own.
    halved: the bound on rows that running out of memory has led to, or None. fixed: never halve, where other ranks
    count on as many passes of this one.
    """

    rows: int | None = None
    tokens: int | None = None
    halved: int | None = None
    fixed: bool = False

    def plan(self, prompts: Sequence[int], responses: Sequence[int]) -> list[list[int]]:
        """Rows with so many prompt and response tokens, in parts: the longest first, like lengths together."""
        count = len(prompts)
        most = min(self.rows or count, self.halved or count)
        if most >= count and self.tokens is None:
            return [list(range(count))]
        parts: list[list[int]] = []
        wide = (0, 0)  # of the last part: its widest prompt and response
        for row in sorted(range(count), key=lambda i: -(prompts[i] + responses[i])):
            grown = (max(wide[0], prompts[row]), max(wide[1], responses[row]))
            too_many = bool(parts) and (len(parts[-1]) + 1) * sum(grown) > (self.tokens or float("inf"))
            if not parts or len(parts[-1]) == most or too_many:
                parts.append([])
                grown = (prompts[row], responses[row])
            parts[-1].append(row)
            wide = grown
        return parts if len(parts) > 1 else [list(range(count))]

    def run(self, prompts: Sequence[int], responses: Sequence[int], work: Callable[[list[list[int]]], T]) -> T:
        """work(parts); where memory runs out, again with half the rows a part, which then stays so.

        work leaves no trace when it raises, or removes it when it begins. Raises OutOfMemory at a single row.
        """
        while True:
            parts = self.plan(prompts, responses)
            try:
                return work(parts)
            except RuntimeError as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
                if self.fixed or not out_of_memory:
                    raise
                self._halve(max(map(len, parts)), error)
            clear_device_cache(garbage_collection=True)  # once the error is gone, and with it what its frames held

    def _halve(self, rows: int, error: RuntimeError) -> None:
        if rows == 1:
            raise OutOfMemory(
                "memory runs out with one sample in a pass: shorten policy.max_new_tokens, lower the processor's image "
                "resolution, or set policy.gradient_checkpointing, model.dtype: bfloat16 or model.quantization"
            ) from error
        self.halved = rows // 2
        log.warning("out of memory with %d samples in a pass: going on with at most %d", rows, self.halved)


def lengths(inputs: Inputs, responses: Responses) -> tuple[list[int], list[int]]:
    """Tokens of each row's prompt and response."""
    return inputs.attention_mask.sum(1).tolist(), responses.mask.sum(1).tolist()


def by_parts(
    look: Callable[[list[int], Inputs, Responses], Any], inputs: Inputs, responses: Responses, batches: MicroBatches
) -> Any:
    """look(rows, their inputs, their responses) for every part, the answers put together in the rows' order.

    An answer is a tensor (b,) or (b, r) of a part's b rows, or a tuple of such; what a part has not is 0.
    """

    def work(parts: list[list[int]]) -> Any:
        if len(parts) == 1:
            return look(parts[0], inputs, responses)
        answers = [look(rows, *trim(inputs.select(rows), responses.select(rows))) for rows in parts]
        if isinstance(answers[0], Tensor):
            return stitch(parts, answers, responses.ids.shape[1])
        return tuple(stitch(parts, group, responses.ids.shape[1]) for group in zip(*answers, strict=True))

    return batches.run(*lengths(inputs, responses), work)


def stitch(parts: Sequence[Sequence[int]], answers: Sequence[Tensor], width: int, value: int = 0) -> Tensor:
    """Answers of parts, (b,) or (b, r), to (B,) or (B, width) in the rows' own order; new columns hold `value`."""
    wide = [a if a.dim() == 1 else pad(a, (0, width - a.shape[1]), value=value) for a in answers]
    return in_order(wide, parts)


def trim(inputs: Inputs, responses: Responses) -> tuple[Inputs, Responses]:
    """Without the columns that are pads in every row: they cost time and change nothing."""
    start = inputs.input_ids.shape[1] - max(1, int(inputs.attention_mask.sum(1).max()))
    inputs = replace(
        inputs,
        input_ids=inputs.input_ids[:, start:],
        attention_mask=inputs.attention_mask[:, start:],
        token_extras={name: extra[:, start:] for name, extra in inputs.token_extras.items()},
    )
    return inputs, cut(responses, max(1, int(responses.mask.sum(1).max())))


def cut(part: T, width: int) -> T:
    """Every (B, R) tensor of a dataclass to its first `width` columns."""
    tensors = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    wide = {name: x[:, :width] for name, x in tensors.items() if isinstance(x, Tensor) and x.dim() == 2}
    return replace(part, **wide)  # type: ignore[type-var]
