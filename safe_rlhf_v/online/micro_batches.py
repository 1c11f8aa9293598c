"""Rows into forward passes: those of like length or of one prompt together, within a budget, and fewer when memory
runs out.

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

from beavertails_v.errors import UserError
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.collation import distinct, in_order

T = TypeVar("T")
log = logging.getLogger(__name__)


class OutOfMemory(UserError, RuntimeError):
    """Memory runs out with a single row in a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSizes:
    """Of B rows: tokens of their prompts and responses, and which prompt each reads; a pass reads a prompt once."""

    prompts: Sequence[int]
    responses: Sequence[int]
    prompt_of: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def kept_tokens(self, rows: Sequence[int]) -> int:
        """Tokens, pads included, whose keys and values a pass of these rows holds."""
        return len(rows) * (max(self.prompts[i] for i in rows) + max(self.responses[i] for i in rows))

    def computed_tokens(self, rows: Sequence[int]) -> int:
        """Tokens, pads included, that it computes, the last of a prompt counted once."""
        prompts = len({self.prompt_of[i] for i in rows}) * max(self.prompts[i] for i in rows)
        return prompts + len(rows) * max(self.responses[i] for i in rows)


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

    def plan(self, sizes: RowSizes) -> list[list[int]]:
        """Rows in parts, the longest first: like lengths together, or samples of a prompt, whichever is fewer tokens to
        compute over all passes."""
        count = len(sizes)
        most = min(self.rows or count, self.halved or count)
        if most >= count and (self.tokens is None or sizes.kept_tokens(range(count)) <= self.tokens):
            return [list(range(count))]
        totals = [p + r for p, r in zip(sizes.prompts, sizes.responses, strict=True)]
        longest: dict[int, int] = {}
        for prompt, total in zip(sizes.prompt_of, totals, strict=True):
            longest[prompt] = max(total, longest.get(prompt, 0))
        by_length = sorted(range(count), key=lambda i: -totals[i])
        by_prompt = sorted(by_length, key=lambda i: (-longest[sizes.prompt_of[i]], sizes.prompt_of[i]))
        plans = [self._fill(order, sizes, most) for order in (by_length, by_prompt)]
        return min(plans, key=lambda parts: sum(map(sizes.computed_tokens, parts)))

    def _fill(self, order: Sequence[int], sizes: RowSizes, most: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for row in order:
            full = not parts or len(parts[-1]) == most
            if full or sizes.kept_tokens([*parts[-1], row]) > (self.tokens or float("inf")):
                parts.append([])
            parts[-1].append(row)
        return parts

    def run(self, sizes: RowSizes, work: Callable[[list[list[int]]], T]) -> T:
        """work(parts); where memory runs out, again with half the rows a part, which then stays so.

        work leaves no trace when it raises, or removes it when it begins. Raises OutOfMemory at a single row.
        """
        while True:
            parts = self.plan(sizes)
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


def sizes_of(inputs: Inputs, responses: Responses, read_once: bool) -> RowSizes:
    """read_once: a forward computes a prompt that rows share once (`Roles.reads_once`)."""
    prompts, lengths = inputs.attention_mask.sum(1).tolist(), responses.mask.sum(1).tolist()
    return RowSizes(
        prompts=prompts, responses=lengths, prompt_of=distinct(inputs)[1] if read_once else range(len(prompts))
    )


def by_parts(
    look: Callable[[list[int], Inputs, Responses], Any],
    inputs: Inputs,
    responses: Responses,
    batches: MicroBatches,
    read_once: bool,
) -> Any:
    """look(rows, their inputs, their responses) for every part, the answers put together in the rows' order.

    An answer is a tensor (b,) or (b, r) of a part's b rows, or a tuple of such; what a part has not is 0.
    read_once: as of `sizes_of`.
    """

    def work(parts: list[list[int]]) -> Any:
        if len(parts) == 1:
            return look(parts[0], inputs, responses)
        answers = [look(rows, *trim(inputs.select(rows), responses.select(rows))) for rows in parts]
        if isinstance(answers[0], Tensor):
            return stitch(parts, answers, responses.ids.shape[1])
        return tuple(stitch(parts, group, responses.ids.shape[1]) for group in zip(*answers, strict=True))

    return batches.run(sizes_of(inputs, responses, read_once), work)


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
    return inputs, truncate(responses, max(1, int(responses.mask.sum(1).max())))


def truncate(part: T, width: int) -> T:
    """Every (B, R) tensor of a dataclass to its first `width` columns."""
    tensors = {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]
    wide = {name: x[:, :width] for name, x in tensors.items() if isinstance(x, Tensor) and x.dim() == 2}
    return replace(part, **wide)  # type: ignore[type-var]
