"""A prompt is read once for all its samples: its keys and values are repeated, not the prompt.

Shapes: N distinct prompts, B rows, P prompt length (left-padded), R response length, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from safe_rlhf_v.models.backbone import hidden_states, on_device, position_ids
from safe_rlhf_v.models.collation import alike, join
from safe_rlhf_v.models.quirks import TOKEN_ALIGNED
from safe_rlhf_v.types import Inputs, Responses


def response_states(model: Any, inputs: Inputs, responses: Responses, placeholders: Sequence[int]) -> Tensor:
    """(B, R + 1, H): final states of the last prompt token and of every response token, at P - 1 .. P + R - 1.

    Without gradients, and where rows share prompts, each prompt is read once. placeholders: ids that stand for
    pictures.
    """
    inputs, responses = on_device(model, inputs), on_device(model, responses)
    last = inputs.input_ids.shape[1] - 1
    if torch.is_grad_enabled() or len(alike(inputs)) > 1:
        return hidden_states(model, inputs, responses)[:, last:]
    first, prompt_of = distinct(inputs)
    if len(first) == len(inputs) or not readable_once(model, inputs, placeholders):
        return hidden_states(model, inputs, responses)[:, last:]
    with evaluating(model):  # in train mode a model that recomputes activations drops its cache
        cache = read(model, inputs.select(first))
        cache.batch_select_indices(torch.tensor(prompt_of, device=model.device))
        whole = join(inputs, responses)
        return model.base_model(  # type: ignore[no-any-return]
            input_ids=whole["input_ids"][:, last:],
            attention_mask=whole["attention_mask"],
            position_ids=position_ids(model, whole)[..., last:],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state


def read(model: Any, inputs: Inputs) -> DynamicCache:
    """Keys and values of all but the last token of each prompt."""
    prefix, cache = _without_last(inputs), DynamicCache(config=model.config)
    positions = position_ids(model, join(inputs))[..., :-1]  # (B, P - 1), or (3 or 4, B, P - 1) for M-RoPE
    arguments = join(prefix) | {"position_ids": positions, "past_key_values": cache}
    model.base_model(**arguments, use_cache=True, return_dict=True)
    return cache


def readable_once(model: Any, inputs: Inputs, placeholders: Sequence[int], sliding: bool = True) -> bool:
    """Whether all layers keep plain keys and values, which can be repeated, and the prompts are two tokens and end in
    text. What is not so (linear attention, cross-attention to pictures) is read afresh for every sample.

    sliding: whether windows of keys and values will do.
    """
    plain = {DynamicLayer, DynamicSlidingWindowLayer} if sliding else {DynamicLayer}
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    pictures = torch.tensor(list(placeholders), device=inputs.input_ids.device)
    ends_in_text = not bool(torch.isin(inputs.input_ids[:, -1], pictures).any())
    crossed = any(TOKEN_ALIGNED & row.keys() for row in inputs.vision)
    return kinds <= plain and inputs.input_ids.shape[1] > 1 and ends_in_text and not crossed


def distinct(inputs: Inputs) -> tuple[list[int], list[int]]:
    """The first row of each distinct prompt, and for every row the index of its prompt among those."""
    pictures: Sequence[str | int] = inputs.picture_keys or [id(entries) for entries in inputs.vision]
    found: dict[Any, int] = {}
    first: list[int] = []
    prompt_of: list[int] = []
    for row, (ids, mask, picture) in enumerate(
        zip(inputs.input_ids.tolist(), inputs.attention_mask.tolist(), pictures, strict=True)
    ):
        index = found.setdefault((*ids, *mask, picture), len(found))
        prompt_of.append(index)
        first += [row] if index == len(first) else []
    return first, prompt_of


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and afterwards the mode the model was in."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _without_last(inputs: Inputs) -> Inputs:
    """Prompts without their last token, (B, P - 1)."""
    return replace(
        inputs,
        input_ids=inputs.input_ids[:, :-1],
        attention_mask=inputs.attention_mask[:, :-1],
        token_extras={name: extra[:, :-1] for name, extra in inputs.token_extras.items()},
    )
