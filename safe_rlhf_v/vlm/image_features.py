"""An image is encoded once: its features then serve generation, log-probabilities, scores and values.

Row features are {} for a row without images, else `ImageFeatures`.
Exact only while the tower and its projector are frozen: `Roles` see to that.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from safe_rlhf_v.types import Inputs
from safe_rlhf_v.vlm.collation import ImageFeatures, join_vision
from safe_rlhf_v.vlm.lru import Lru

log = logging.getLogger(__name__)
_warned: set[str] = set()


def supports_features(model: Any) -> bool:
    """Whether the model's forward takes image features in place of pixels."""
    forward = inspect.signature(model.forward).parameters
    return "mm_encoder_outputs" in forward and hasattr(model.base_model, "get_image_features")


def encode_images(model: Any, inputs: Inputs, cache: VisionCache | None = None) -> Inputs:
    """`inputs` with `.features` filled, by the frozen tower, without gradients; equal images are encoded once.

    Rows with equal `image_keys` share features; `cache`, if given, keeps them between calls. A family whose forward
    takes no features gets its inputs back unchanged, and one warning is logged.
    """
    if inputs.features is not None or not any(inputs.vision):
        return inputs
    if not supports_features(model):
        _warn_once(f"{type(model).__name__} takes no image features: images are encoded afresh at every forward")
        return inputs
    keys = inputs.image_keys or tuple(str(i) for i in range(len(inputs)))
    if not inputs.image_keys:
        cache = None
    found = {key: cache.get(key) for key in set(keys)} if cache is not None else {}
    known = {key: row for key, row in found.items() if row is not None}
    first = {key: i for i, key in reversed(list(enumerate(keys))) if inputs.vision[i] and key not in known}
    # A cache must not change any result: whether an image's neighbours were known must not show in its features.
    groups = [[row] for row in first.values()] if cache is not None else [list(first.values())]
    for rows in filter(None, groups):
        known.update(zip((keys[i] for i in rows), _encode(model, inputs, rows), strict=True))
    for key in first if cache is not None else ():
        cache.put(key, known[key])  # type: ignore[union-attr]
    return replace(inputs, features=tuple(known[k] if v else {} for k, v in zip(keys, inputs.vision, strict=True)))


@torch.no_grad()
def _encode(model: Any, inputs: Inputs, rows: Sequence[int]) -> list[ImageFeatures]:
    """Features of the given rows in one forward of the tower."""
    encode = model.base_model.get_image_features  # the one its forward calls: the outer may name fewer arguments
    wanted = inspect.signature(encode).parameters
    vision = {k: v.to(model.device) for k, v in join_vision([inputs.vision[i] for i in rows]).items() if k in wanted}
    output = encode(**vision, return_dict=True)
    tokens = (inputs.input_ids[list(rows)] == model.config.image_token_id).sum(1).tolist()
    return split_features(output, tokens)


def split_features(output: Any, tokens: Sequence[int]) -> list[ImageFeatures]:
    """Split a batch's features into rows by their numbers of image tokens. Raises where the two do not match."""
    entries = list(output.pooler_output)
    ends = {end: i + 1 for i, end in enumerate(accumulate(len(entry) for entry in entries))}
    splits = [0, *accumulate(tokens)]
    if any(split not in ends for split in splits[1:]) or splits[-1] != max(ends):
        sizes = [len(entry) for entry in entries]
        raise ValueError(f"image features of sizes {sizes} do not fall on the rows' image tokens {list(tokens)}")
    bounds = [0, *(ends[split] for split in splits[1:])]
    layers = getattr(output, "deepstack_features", None) or ()
    return [
        {
            "pooler_output": tuple(entries[start:end]),
            "stacked": isinstance(output.pooler_output, Tensor),
            "deepstack_features": tuple(tuple(layer[start:end]) for layer in layers),
        }
        for start, end in pairwise(bounds)
    ]


class VisionCache(Lru[ImageFeatures]):
    """Features by image key, kept between steps. limit: bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit, _bytes)


def _bytes(row: ImageFeatures) -> int:
    tensors = [*row["pooler_output"], *(t for layer in row["deepstack_features"] for t in layer)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning(message)
