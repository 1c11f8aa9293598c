"""Rows into batches, batches into the arguments of a forward. No family is named here; `quirks` holds what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never, TypedDict, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.quirks import PIXEL_INPUT, SAME_SHAPES, TOKEN_ALIGNED

TOKEN_KEYS = ("input_ids", "attention_mask")


def as_row(data: Mapping[str, Any], image_key: str = "") -> Inputs:
    """What the processor gave for one prompt, sorted into token-shaped and vision entries. Raises on anything else."""
    shape = data["input_ids"].shape
    strange = [k for k, v in data.items() if not isinstance(v, Tensor)]
    if strange:
        raise TypeError(f"the processor returned {strange}, which are not tensors: it is not supported")
    extras = {k: v for k, v in data.items() if v.shape == shape and k not in TOKEN_KEYS}
    vision = {k: v for k, v in data.items() if v.shape != shape}
    return Inputs(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"],
        token_extras=extras,
        vision=(vision,),
        image_keys=(image_key,),
    )


def collate(rows: Sequence[Inputs], pad_id: int = 0) -> Inputs:
    """Left-pad and stack. Extras that a row lacks are 0 there. Features survive where every row has them."""
    width = max(row.input_ids.shape[1] for row in rows)
    extras = {name: None for row in rows for name in row.token_extras}
    featured = all(row.features is not None for row in rows)

    def stacked(parts: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.cat([pad(t, (width - t.shape[1], 0), value=value) for t in parts])

    def extra(row: Inputs, name: str) -> Tensor:
        return row.token_extras[name] if name in row.token_extras else torch.zeros_like(row.input_ids)

    return Inputs(
        input_ids=stacked([row.input_ids for row in rows], pad_id),
        attention_mask=stacked([row.attention_mask for row in rows]),
        token_extras={name: stacked([extra(row, name) for row in rows]) for name in extras},
        vision=tuple(v for row in rows for v in row.vision),
        features=tuple(f for row in rows for f in row.features or ()) if featured else None,
        image_keys=tuple(k for row in rows for k in row.image_keys),
    )


def stack_responses(rows: Sequence[Sequence[int]], pad_id: int = 0) -> Responses:
    """Right-pad token lists: ids (B, R), mask (B, R) True on the given tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    return Responses(ids=ids, mask=torch.arange(width)[None, :] < lengths[:, None])


def join(inputs: Inputs, responses: Responses | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward for prompts (B, P), or prompts and responses (B, P + R).

    Where `inputs.features` is set they go in as mm_encoder_outputs and the pixels stay out.
    """
    ids, mask, extras = inputs.input_ids, inputs.attention_mask, dict(inputs.token_extras)
    if responses is not None:
        ids = torch.cat([ids, responses.ids], dim=1)
        mask = torch.cat([mask, responses.mask.to(mask.dtype)], dim=1)
        extras = {k: pad(v, (0, responses.ids.shape[1])) for k, v in extras.items()}
    left = inputs.input_ids.shape[1]
    vision = join_vision([_on_tokens(row, left, ids.shape[1] - left) for row in inputs.vision])
    if inputs.features is not None:
        vision = {k: v for k, v in vision.items() if not PIXEL_INPUT.match(k)} | join_features(inputs.features)
    return {"input_ids": ids, "attention_mask": mask, **extras, **vision}


def _on_tokens(row: Mapping[str, Tensor], prompt: int, response: int) -> Mapping[str, Tensor]:
    """A row's vision inputs, those with a token dimension stretched to `prompt` + `response` tokens (see `quirks`)."""
    stretched = {}
    for name in TOKEN_ALIGNED & row.keys():
        own, rest = row[name], row[name].shape[2:]  # (1, P of this row, ...)
        before, after = own.new_zeros(1, prompt - own.shape[1], *rest), own[:, -1:].expand(-1, response, *rest)
        stretched[name] = torch.cat([before, own, after], dim=1)
    return {**row, **stretched}


def alike(inputs: Inputs) -> list[list[int]]:
    """Rows that may share a forward: all in one group, but for families that `quirks.SAME_SHAPES` knows."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(inputs.vision or ({},) * len(inputs)):
        groups.setdefault(tuple(row[name].shape for name in SAME_SHAPES & row.keys()), []).append(i)
    return list(groups.values())


def distinct(inputs: Inputs) -> tuple[list[int], list[int]]:
    """The first row of each distinct prompt, and for every row the index of its prompt among those."""
    pictures: Sequence[str | int] = inputs.image_keys or [id(entries) for entries in inputs.vision]
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


def in_order(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Rows of the groups' tensors, each (rows, ...), back in the order of the batch."""
    order = torch.tensor([i for group in groups for i in group], device=parts[0].device)
    return torch.cat(list(parts))[order.argsort()]


def join_vision(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Join rows' vision inputs: zero-pad trailing dimensions to the largest, concatenate on dimension 0."""
    names = {name: None for row in rows for name in row}
    return {name: _concatenate([row[name] for row in rows if name in row]) for name in names}


class ImageFeatures(TypedDict):
    """What the vision tower gives for the pictures of one row.

    pooler_output: (T_i, H) tensors, one per picture or tile, projected to the language model's width.
    stacked: whether the family wants them as one tensor (n, T, H) rather than a list.
    deepstack_features: of each layer what pooler_output is of the last (Qwen3-VL); () elsewhere.
    """

    pooler_output: tuple[Tensor, ...]
    stacked: bool
    deepstack_features: tuple[tuple[Tensor, ...], ...]


def join_features(rows: Sequence[ImageFeatures | Mapping[str, Never]]) -> dict[str, Any]:
    """Put rows' cached image features, {} of a row without pictures, into the shape the model's forward takes."""
    found = [cast(ImageFeatures, row) for row in rows if row]
    if not found:
        return {}
    entries = [entry for row in found for entry in row["pooler_output"]]
    output = BaseModelOutputWithPooling(pooler_output=torch.stack(entries) if found[0]["stacked"] else entries)
    if found[0]["deepstack_features"]:
        layers = zip(*(row["deepstack_features"] for row in found), strict=True)
        output.deepstack_features = [[entry for part in layer for entry in part] for layer in layers]
    return {"mm_encoder_outputs": {"image": output}}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {t.shape[1:] for t in tensors}
    if len(shapes) > 1:
        target = [max(sizes) for sizes in zip(*shapes, strict=True)]
        tensors = [_pad_to(t, target) for t in tensors]
    return torch.cat(list(tensors))


def _pad_to(tensor: Tensor, target: Sequence[int]) -> Tensor:
    """Zero-pad every dimension but the first at its end."""
    amounts = [(0, want - have) for want, have in zip(target, tensor.shape[1:], strict=True)]
    return pad(tensor, [x for pair in reversed(amounts) for x in pair])


def row_bytes(row: Inputs) -> int:
    """Memory that the tensors of an encoded row take."""
    vision = (t for entries in row.vision for t in entries.values())
    tensors = [row.input_ids, row.attention_mask, *row.token_extras.values(), *vision]
    return sum(t.numel() * t.element_size() for t in tensors)
