"""Shared prompts: a prompt is forwarded once for all its samples: its keys and values are repeated, not the prompt.

Shapes: N distinct prompts, B rows, P prompt length (left-padded), R response length, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from safe_rlhf_v.tensors import pool_last
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import hidden_states, on_device, position_ids
from safe_rlhf_v.vlm.collation import alike, distinct, in_order, join
from safe_rlhf_v.vlm.like_length import of_like_length
from safe_rlhf_v.vlm.memory import keeps_caches
from safe_rlhf_v.vlm.quirks import MODALITY_ATTRIBUTE, TOKEN_ALIGNED


def response_states(model: Any, inputs: Inputs, responses: Responses, *, one_forward: bool = False) -> Tensor:
    """(B, R + 1, H): final states of the last prompt token and of every response token, at P - 1 .. P + R - 1.

    Where rows share prompts, each prompt is forwarded once, and its gradient is the sum over its rows; on a CPU, short
    responses are forwarded apart from long ones. one_forward: of the backbone, whatever the rows share.
    """
    inputs, responses = on_device(model, inputs), on_device(model, responses)
    last, grad = inputs.input_ids.shape[1] - 1, torch.is_grad_enabled()
    first, prompt_of = distinct(inputs)
    parts = of_like_length(responses)
    if one_forward or (len(first) == len(inputs) and len(parts) == 1) or not reads_once(model, inputs, grad):
        return hidden_states(model, inputs, responses)[:, last:]
    with nullcontext() if grad else eval_mode(model):  # train mode is what makes it recompute activations
        cache = empty_cache(model, keep=True)
        try:
            prefill(model, inputs.select(first), cache)
            caches = [repeat_cache(model, cache, [prompt_of[i] for i in rows]) for rows in parts]
        finally:
            release_cache(model, cache)
        both = join(inputs, responses)
        both["position_ids"] = position_ids(model, both)
        width = responses.ids.shape[1]
        states = [
            _continued(model, both, last, rows, int(responses.mask[rows].sum(1).max()) if len(parts) > 1 else width, c)
            for rows, c in zip(parts, caches, strict=True)
        ]
        return in_order([pad(s, (0, 0, 0, width + 1 - s.shape[1])) for s in states], parts)


def _continued(
    model: Any, both: Mapping[str, Tensor], last: int, rows: list[int], width: int, cache: DynamicCache
) -> Tensor:
    """(b, width + 1, H): states of some rows of `response_states`, after what the cache holds of their prompts."""
    end = last + 1 + width
    return model.base_model(  # type: ignore[no-any-return]
        input_ids=both["input_ids"][rows, last:end],
        attention_mask=both["attention_mask"][rows, :end],
        position_ids=both["position_ids"][..., rows, last:end],
        past_key_values=cache,
        use_cache=False,  # the one given is used; more would be a warning where activations are recomputed
        return_dict=True,
    ).last_hidden_state


def last_state(states: Tensor, inputs: Inputs, responses: Responses) -> Tensor:
    """(B, H) float32, of `response_states`: at the last response token, or of the prompt where there is none."""
    mask = torch.cat([inputs.attention_mask[:, -1:].bool(), responses.mask], dim=1).to(states.device)
    return pool_last(states, mask).float()


def prefill(model: Any, inputs: Inputs, cache: DynamicCache | None = None) -> DynamicCache:
    """Keys and values of all but the last token of each prompt."""
    prompts, cache = _without_last(inputs), DynamicCache(config=model.config) if cache is None else cache
    positions = position_ids(model, join(inputs))[..., :-1]  # (B, P - 1), or (3 or 4, B, P - 1) for M-RoPE
    arguments = join(prompts) | {"position_ids": positions, "past_key_values": cache}
    model.base_model(**arguments, use_cache=False, return_dict=True)
    return cache


class _RerunLayer(DynamicLayer):
    """A layer's keys and values in a forward whose layers may run twice, the second time to recompute activations: both
    times start from the same. keep: what the forward adds. prompt_of: the prompt of each row, where what is kept is of
    prompts."""

    keep = False
    prompt_of: Sequence[int] | None = None
    keys: Any
    values: Any

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = dict(vars(self))
        if self.prompt_of is not None and self.keys is not None:
            # by parts: the gradient of an index adds up its rows in any order on a GPU, and not twice the same
            of_prompts = self.keys.unbind(), self.values.unbind()
            self.keys, self.values = (torch.stack([parts[i] for i in self.prompt_of]) for parts in of_prompts)
        found = super().update(*args, **kwargs)
        if not self.keep:
            self.__dict__.update(start)
        return found


class _RerunSlidingLayer(_RerunLayer, DynamicSlidingWindowLayer):
    pass


def empty_cache(model: Any, keep: bool = False) -> DynamicCache:
    """A cache of plain and sliding layers that may run twice. keep: what a forward adds."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        cache.layers[i] = _RerunSlidingLayer(sliding_window=layer.sliding_window) if sliding else _RerunLayer()
        cache.layers[i].keep = keep
    return cache


def repeat_cache(model: Any, cache: DynamicCache, prompt_of: Sequence[int]) -> DynamicCache:
    """Keys and values of N prompts for a forward of B rows, repeated in each layer when it runs."""
    rows = empty_cache(model)
    for layer, of_prompts in zip(rows.layers, cache.layers, strict=True):
        layer.__dict__.update({**vars(of_prompts), "keep": False, "prompt_of": prompt_of})
    return rows


def release_cache(model: Any, cache: DynamicCache) -> None:
    """Empty a cache that a forward has filled. One that recomputes holds its cache, and the keys in it hold the
    forward: a ring that Python does not see, so that nothing of a forward without a backward would ever be freed."""
    cache.layers = empty_cache(model).layers


def reads_once(model: Any, inputs: Inputs, grad: bool = True) -> bool:
    """Whether `response_states` forwards prompts that rows share once. grad: where gradients are taken."""
    drops = grad and model.training and not keeps_caches(model)
    return not drops and len(alike(inputs)) == 1 and can_share_prompts(model, inputs)


def can_share_prompts(model: Any, inputs: Inputs, sliding: bool = True) -> bool:
    """Whether all layers keep plain keys and values, which can be repeated, and the prompts are two tokens and end in
    text. What is not so (linear attention, cross-attention to images) is forwarded afresh for every sample.

    sliding: whether windows of keys and values will do.
    """
    ends_in_text = _image_token_ids(model.config).isdisjoint(inputs.input_ids[:, -1].tolist())
    crossed = any(TOKEN_ALIGNED & row.keys() for row in inputs.vision)
    plain = keeps_plain_caches(model.config, sliding)
    return plain and inputs.input_ids.shape[1] > 1 and ends_in_text and not crossed


def _image_token_ids(config: Any) -> set[int]:
    """Token ids that stand for images, or fence them."""
    named = [value for name, value in vars(config).items() if MODALITY_ATTRIBUTE.match(name)]
    return {i for value in named for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)}


def keeps_plain_caches(config: Any, sliding: bool = True) -> bool:
    """Whether all layers keep plain keys and values, or, if `sliding` will do, windows of them."""
    plain = {DynamicLayer, DynamicSlidingWindowLayer} if sliding else {DynamicLayer}
    return {type(layer) for layer in DynamicCache(config=config).layers} <= plain


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
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
