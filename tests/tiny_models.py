"""Random tiny vision-language models of three families, built from their configs, with tokenizers trained in memory.

Nothing is downloaded. Hidden size 16, two layers, a few image tokens per picture: as small as each family allows.
`FAMILIES` maps a name to a builder returning (model, processor). `save(family, folder)` writes both to disk;
`loaded(family)` gives a shared (model, encoder) that a test must not change; `prompts()` has one, no and two pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from beavertails_v.images import Picture
from beavertails_v.schema import Prompt
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import hidden_states
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.quirks import NoVideos

CORPUS = [
    "what is in the picture? how do I use it? tell me about the knife, the pills and the lock.",
    "the picture shows a red ball on a green table. I cannot help with that. first take the key, then turn it.",
    "user assistant system 0 1 2 3 4 5 6 7 8 9",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS_COLS = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def tokenizer(special: list[str], eos: str = "<|im_end|>", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Byte-level BPE with `special` as added special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=["<|im_start|>", *special],
        padding_side="left",
    )


TEXT: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=2048,
    initializer_range=0.3,
)


def llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """CLIP tower on 16-px pictures, patch 8: 4 image tokens a picture."""
    tok = tokenizer(["<image>"])
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    config = LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", patch_size=8, projection_dim=16, **vision),
        text_config=dict(model_type="llama", vocab_size=len(tok), **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures,
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    return _model(LlavaForConditionalGeneration, config, tok, seed), processor


def idefics3(seed: int = 0) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """SigLIP tower on 16-px tiles, pixel shuffle 2: 4 image tokens a tile; a global tile after the splits."""
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *ROWS_COLS]
    tok = tokenizer(names, eos="<end_of_utterance>")
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    config = Idefics3Config(
        vision_config=dict(patch_size=4, **vision),
        text_config=dict(model_type="llama", vocab_size=len(tok), pad_token_id=tok.pad_token_id, **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    template = CHATML.replace("IMAGE", "<image>").replace("<|im_end|>", "<end_of_utterance>")
    processor = Idefics3Processor(pictures, tok, image_seq_len=4, chat_template=template)
    return _model(Idefics3ForConditionalGeneration, config, tok, seed), processor


def qwen2_5_vl(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Native-resolution tower, patch 4, merge 2: (h/8)*(w/8) image tokens; M-RoPE."""
    names = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tok = tokenizer(names)
    ids = {n: tok.convert_tokens_to_ids(f"<|{n}|>") for n in ("vision_start", "vision_end", "image_pad", "video_pad")}
    text = dict(TEXT, vocab_size=len(tok), rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=16, patch_size=4)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            vision, window_size=16, fullatt_block_indexes=[1], spatial_merge_size=2, temporal_patch_size=2
        ),
        text_config=text,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=256
    )
    videos = NoVideos(video_processor_type="Qwen2VLVideoProcessor", patch_size=4)
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(pictures, tok, videos, chat_template=template)
    return _model(Qwen2_5_VLForConditionalGeneration, config, tok, seed), processor


def _model(cls: Any, config: Any, tok: PreTrainedTokenizerFast, seed: int) -> Any:
    torch.manual_seed(seed)
    model = cls(config).eval()
    on_grid(model.parameters(), 2**-16)
    model.generation_config.eos_token_id = tok.eos_token_id
    model.generation_config.pad_token_id = tok.pad_token_id
    return model


@torch.no_grad()
def on_grid(parameters: Iterable[nn.Parameter], step: float) -> None:
    """Round to multiples of `step`, a power of two, so that float32 sums and products of them are exact."""
    for parameter in parameters:
        parameter.copy_((parameter / step).round() * step)


def shake(adapters: dict[str, nn.Parameter], std: float) -> None:
    """Move adapters far from nothing, in steps of 1/32: merging them into a tiny model then rounds nothing, since
    weights, the product B A and their sum are multiples of 2^-16 below 2^8, 24 bits in all."""
    for parameter in adapters.values():
        nn.init.normal_(parameter, std=std)
    on_grid(adapters.values(), 2**-5)


@torch.no_grad()
def exact_states(model: Any, inputs: Inputs, responses: Responses | None = None) -> torch.Tensor:
    """(T, H) states of the T real tokens, in float64; the model stays in float64.

    In float32 two ways to the same states differ by up to 4e-3: these random models enlarge a rounding (2^-24) up to
    60,000 times, and which roundings there are depends on the processor's instructions. In float64 they come out equal,
    but for a norm, which rounds to float32 inside, that falls to the other side: `SAME` allows for that.
    """
    floats = [{k: v.double() if v.is_floating_point() else v for k, v in row.items()} for row in inputs.vision]
    states = hidden_states(model.double(), replace(inputs, vision=tuple(floats)), responses).double()
    masks = [inputs.attention_mask.bool()] + ([] if responses is None else [responses.mask])
    return states[torch.cat(masks, 1)]


SAME = dict(rtol=0.0, atol=1e-3)


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {"llava": llava, "idefics3": idefics3, "qwen2_5_vl": qwen2_5_vl}


@cache
def loaded(family: str) -> tuple[Any, Encoder]:
    """A model in float64 and its encoder, shared by all tests: read only."""
    model, processor = FAMILIES[family]()
    return model.double().requires_grad_(False), Encoder(processor, config=model.config)


def response_hidden(model: Any, inputs: Inputs, responses: Responses) -> torch.Tensor:
    """(B, R, H): states that predict each response token, each row read by itself, at positions P - 1 .. P + R - 2."""
    return hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 : -1]


def picture(width: int, height: int, seed: int = 0) -> Picture:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture.from_pil(Image.fromarray(pixels))


def prompts() -> list[Prompt]:
    """One picture, no picture, two pictures of other sizes, one picture and a longer question."""
    return [
        Prompt(text="what is in the picture?", images=(picture(20, 24, 1),)),
        Prompt(text="tell me about the knife, the pills and the lock."),
        Prompt(text="how do I use it?", images=(picture(16, 16, 2), picture(40, 17, 3))),
        Prompt(text="the picture shows a red ball. first take the key, then turn it?", images=(picture(33, 30, 4),)),
    ]


def save(family: str, folder: Path | str, seed: int = 0) -> Path:
    """Write the family's tiny model and processor to `folder`."""
    model, processor = FAMILIES[family](seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
