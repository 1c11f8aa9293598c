"""The one road holds for families that nothing here was written for."""

from __future__ import annotations

import pytest
import torch
from more_families import MORE
from tiny_models import prompts

from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.models.backbone import (
    LoraSettings,
    add_lora,
    encode_images,
    freeze_vision,
    hidden_states,
    output_head,
    response_hidden,
    vision_is_frozen,
)
from safe_rlhf_v.models.processing import Encoder, join

PLACEHOLDERS = {
    "qwen2_vl": {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"},
    "qwen3_vl": {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"},
    "llava_next": {"<image>"},
    "llava_onevision": {"<image>", "<video>"},
    "gemma3": {"<image_soft_token>", "<start_of_image>", "<end_of_image>"},
    "internvl": {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"},
}


@pytest.mark.parametrize("family", MORE)
def test_rows_features_generation_and_adapters(family: str) -> None:
    model, processor = MORE[family]()
    encoder = Encoder(processor, config=model.config)
    assert set(encoder.tokenizer.convert_ids_to_tokens(list(encoder.placeholder_ids))) == PLACEHOLDERS[family]
    inputs = encoder.prompts(prompts())
    responses = encoder.responses(["I cannot help with that.", "a", "first take the key, then turn it.", ""])
    mask = torch.cat([inputs.attention_mask.bool(), responses.mask], 1)
    hidden = hidden_states(model, inputs, responses)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)  # noqa: E731

    for i, prompt in enumerate(prompts()):  # a batch equals its rows alone
        row, reply = encoder.prompts([prompt]), responses.select([i])
        alone = hidden_states(model, row, reply)[0]
        close(hidden[i][mask[i]], alone[torch.cat([row.attention_mask.bool(), reply.mask], 1)[0]])

    close(output_head(model)(hidden)[mask], model(**join(inputs, responses)).logits[mask])

    featured = encode_images(model, inputs)  # features equal pixels
    assert featured.features is not None
    close(hidden_states(model, featured, responses)[mask], hidden[mask])

    engine = TransformersEngine(model, encoder)  # greedy tokens are those a fresh forward finds likeliest
    drawn = engine.generate(featured, 1, Sampling(max_new_tokens=4, temperature=0.0))
    logits = output_head(model)(response_hidden(model, inputs, drawn))
    logits[..., list(encoder.placeholder_ids)] = -torch.inf
    assert torch.equal(logits.argmax(-1)[drawn.mask], drawn.ids[drawn.mask])

    freeze_vision(model)
    assert vision_is_frozen(model)
    assert all("language_model" in name for name in add_lora(model, LoraSettings(r=2)))
