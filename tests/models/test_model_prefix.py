"""Prompts that rows share are read once where no gradients are taken, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, loaded, prompts

from safe_rlhf_v.models.backbone import encode_images, hidden_states
from safe_rlhf_v.models.prefix import distinct, readable_once, response_states
from safe_rlhf_v.types import Inputs, Responses

families = pytest.mark.parametrize("family", FAMILIES)
ROWS = [3, 0, 0, 1, 3, 2, 0, 2]  # of four prompts, in no order


def batch(family: str, featured: bool) -> tuple[Any, Any, Inputs, Responses]:
    model, encoder = loaded(family)
    inputs = encoder.prompts(prompts())
    inputs = (encode_images(model, inputs) if featured else inputs).select(ROWS)
    texts = ["I cannot help with that.", "a", "first take the key", "no", "", "a b c", "the lock", "it is red"]
    return model, encoder, inputs, encoder.responses(texts)


@families
@pytest.mark.parametrize("featured", [False, True])
def test_states_are_those_of_whole_sequences(family: str, featured: bool) -> None:
    model, encoder, inputs, responses = batch(family, featured)
    seen: list[tuple[int, ...]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with torch.no_grad():
        found = response_states(model, inputs, responses, encoder.placeholder_ids)
        whole = hidden_states(model, inputs, responses)
    hook.remove()
    width, length = inputs.input_ids.shape[1], responses.ids.shape[1]
    assert seen == [(4, width - 1), (8, length + 1), (8, width + length)]
    mask = torch.cat([torch.ones(8, 1, dtype=torch.bool), responses.mask], dim=1)
    torch.testing.assert_close(found[mask], whole[:, width - 1 :][mask], rtol=1e-5, atol=1e-5)


def test_gradients_go_through_whole_sequences() -> None:
    model, encoder, inputs, responses = batch("llava", True)
    with torch.enable_grad():
        found = response_states(model, inputs, responses, encoder.placeholder_ids)
    assert torch.equal(found, hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :])


def test_a_model_that_recomputes_activations_keeps_its_cache() -> None:
    """transformers drops the cache of a model in train mode with checkpointing: prompts would be forgotten."""
    model, _ = FAMILIES["llava"]()
    _, encoder, inputs, responses = batch("llava", False)
    with torch.no_grad():
        expected = response_states(model, inputs, responses, encoder.placeholder_ids)
        model.get_decoder().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        found = response_states(model, inputs, responses, encoder.placeholder_ids)
    assert model.training
    torch.testing.assert_close(found, expected)


def test_prompts_are_told_apart_by_tokens_and_pictures() -> None:
    _, _, inputs, _ = batch("llava", False)
    assert distinct(inputs) == ([0, 1, 3, 5], [0, 1, 1, 2, 0, 3, 1, 3])
    alike = inputs.select([1, 2])  # one prompt twice; then with another picture
    assert distinct(alike) == ([0], [0, 0])
    assert distinct(replace(alike, picture_keys=("a", "b"))) == ([0, 1], [0, 1])
    assert distinct(replace(alike, picture_keys=(), vision=({}, {}))) == ([0, 1], [0, 1])


def test_prompts_that_end_in_a_picture_are_read_with_their_samples() -> None:
    model, encoder, inputs, responses = batch("llava", False)
    assert readable_once(model, inputs, encoder.placeholder_ids)
    assert not readable_once(model, inputs, [int(inputs.input_ids[0, -1])])
    with torch.no_grad():
        found = response_states(model, inputs, responses, [int(inputs.input_ids[0, -1])])
        assert torch.equal(found, hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :])
