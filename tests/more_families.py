"""Further families, tiny and random. Each builder gives (model, processor); `ALL` has those of `tiny_models` as well.

`known(family)` is a shared (model, encoder), `base(family)` a shared folder: a test must change neither.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from tiny_models import CHATML, FAMILIES, ROWS_COLS, TEXT, _model, _trained, loaded, tokenizer
from tokenizers import Tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from safe_rlhf_v.vlm import processing
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.quirks import NoVideos

VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
GRIDS = [[16, 32], [32, 16], [32, 32]]
SQUARE = {"height": 16, "width": 16}


def named(**tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose modality tokens are attributes (image_token=...)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=tokens,
    )


def qwen_vl(config: Any, cls: Any, processor: Any, vision: dict[str, Any], rope: dict[str, Any]) -> tuple[Any, Any]:
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tok = tokenizer([f"<|{name}|>" for name in names])
    start, end, image, video = (tok.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    patches = dict(patch_size=4, temporal_patch_size=2)
    model_config = config(
        vision_config=dict(depth=2, hidden_size=16, num_heads=2, spatial_merge_size=2, **patches, **vision),
        text_config=dict(TEXT, vocab_size=len(tok), rope_scaling={"mrope_section": [1, 1, 2], **rope}),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pictures = Qwen2VLImageProcessorPil(merge_size=2, min_pixels=64, max_pixels=256, **patches)
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return _model(cls, model_config, tok, 0), processor(pictures, tok, NoVideos(), chat_template=template)


def qwen2_vl() -> tuple[Any, Any]:
    kinds = (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
    return qwen_vl(*kinds, dict(embed_dim=16), {"type": "mrope"})


def qwen3_vl() -> tuple[Any, Any]:
    """Features of two vision layers enter the language model's first layers as well."""
    kinds = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
    vision = dict(intermediate_size=32, out_hidden_size=16, deepstack_visual_indexes=[0, 1], num_position_embeddings=16)
    return qwen_vl(*kinds, vision, {"rope_type": "default", "mrope_interleaved": True})


def llava_next() -> tuple[Any, Any]:
    tok = tokenizer(["<image>"])
    how = dict(vision_feature_select_strategy="default")
    config = LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", patch_size=8, projection_dim=16, image_size=16, **VISION),
        text_config=dict(model_type="llama", vocab_size=len(tok), **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-2,
        **how,
    )
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=GRIDS)
    template = CHATML.replace("IMAGE", "<image>")
    extra = dict(patch_size=8, num_additional_image_tokens=1, chat_template=template)
    return _model(LlavaNextForConditionalGeneration, config, tok, 0), LlavaNextProcessor(pictures, tok, **extra, **how)


def llava_onevision() -> tuple[Any, Any]:
    tok = tokenizer(["<image>", "<video>"])
    how = dict(vision_feature_select_strategy="full")
    config = LlavaOnevisionConfig(
        vision_config=dict(model_type="siglip_vision_model", patch_size=8, image_size=16, **VISION),
        text_config=dict(model_type="qwen2", vocab_size=len(tok), **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
        **how,
    )
    pictures = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS)
    extra = dict(num_image_tokens=4, chat_template=CHATML.replace("IMAGE", "<image>"), **how)
    model = _model(LlavaOnevisionForConditionalGeneration, config, tok, 0)
    return model, LlavaOnevisionProcessor(pictures, tok, NoVideos(), **extra)


def gemma3() -> tuple[Any, Any]:
    """Attention within a picture runs both ways, by token_type_ids."""
    tok = named(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    layers = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    config = Gemma3Config(
        vision_config=dict(image_size=16, patch_size=4, **VISION),
        text_config=dict(TEXT, vocab_size=len(tok), head_dim=8, query_pre_attn_scalar=8, **layers),
        mm_tokens_per_image=4,
        image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
    )
    template = CHATML.replace("IMAGE", "<start_of_image>")
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tok, image_seq_length=4, chat_template=template)
    return _model(Gemma3ForConditionalGeneration, config, tok, 0), processor


def internvl() -> tuple[Any, Any]:
    tokens = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    tok = named(video_token="<video>", **tokens)
    config = InternVLConfig(
        vision_config=dict(image_size=[16, 16], patch_size=[4, 4], **VISION),
        text_config=dict(model_type="qwen2", vocab_size=len(tok), **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    pictures = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4)
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = InternVLProcessor(pictures, tok, NoVideos(), image_seq_length=4, chat_template=template)
    return _model(InternVLForConditionalGeneration, config, tok, 0), processor


def smolvlm() -> tuple[Any, Any]:
    """SmolVLM2. Its processor asks for num2words, with which it spells the lengths of videos; nothing here does."""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *ROWS_COLS]
    tok = tokenizer(names, eos="<end_of_utterance>")
    config = SmolVLMConfig(
        vision_config=dict(image_size=16, patch_size=4, **VISION),
        text_config=dict(model_type="llama", vocab_size=len(tok), pad_token_id=tok.pad_token_id, **TEXT),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    pictures = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    template = CHATML.replace("IMAGE", "<image>").replace("<|im_end|>", "<end_of_utterance>")
    processor = SmolVLMProcessor(pictures, tok, NoVideos(), image_seq_len=4, chat_template=template)
    return _model(SmolVLMForConditionalGeneration, config, tok, 0), processor


PIXTRAL_PARENTS = ("transformers", "transformers.models.pixtral")


def pixtral_processor() -> Any:
    """The class itself. Without torchvision transformers hides it, for a function of which there is a PIL twin."""
    pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", pil)
    found = importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
    importing = {id(m): m for m in (transformers, processing.transformers, *map(sys.modules.get, PIXTRAL_PARENTS)) if m}
    for module in importing.values():  # transformers' lazy modules are not always one object
        module.PixtralProcessor = found
    return found


def pixtral() -> tuple[Any, Any]:
    """Any resolution; a token ends each line of patches."""
    tok = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = LlavaConfig(
        vision_config=dict(model_type="pixtral", image_size=32, patch_size=8, head_dim=8, **VISION),
        text_config=dict(model_type="mistral", vocab_size=len(tok), head_dim=8, **TEXT),
        image_token_id=tok.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pictures = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    processor = pixtral_processor()(pictures, tok, patch_size=8, chat_template=CHATML.replace("IMAGE", "[IMG]"))
    return _model(LlavaForConditionalGeneration, config, tok, 0), processor


def mllama() -> tuple[Any, Any]:
    """Pictures enter by cross-attention, not as tokens. Its gates are opened: at 0, pictures would change nothing."""
    tok = tokenizer(["<|image|>", "<|begin_of_text|>"])
    tok.bos_token = "<|begin_of_text|>"
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2)
    tiles = dict(max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
    text = dict(TEXT, num_hidden_layers=3, pad_token_id=tok.pad_token_id, dropout=0.0)
    config = MllamaConfig(
        vision_config=dict(
            vision, image_size=8, patch_size=4, vision_output_dim=32, intermediate_layers_indices=[1], **tiles
        ),
        text_config=dict(text, vocab_size=len(tok), cross_attention_layers=[1]),
        image_token_index=tok.convert_tokens_to_ids("<|image|>"),
    )
    pictures = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=2)
    template = "{{ bos_token }}" + CHATML.replace("IMAGE", "<|image|>")
    model = _model(MllamaForConditionalGeneration, config, tok, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    return model, MllamaProcessor(pictures, tok, chat_template=template)


_BUILDERS = (qwen2_vl, qwen3_vl, llava_next, llava_onevision, gemma3, internvl, smolvlm, pixtral, mllama)
MORE: dict[str, Callable[[], tuple[Any, Any]]] = {f.__name__: f for f in _BUILDERS}
ALL: dict[str, Callable[[], tuple[Any, Any]]] = {**FAMILIES, **MORE}


@cache
def known(family: str) -> tuple[Any, Encoder]:
    """A model in float64 and its encoder, shared by all tests: read only."""
    if family in FAMILIES:
        return loaded(family)
    model, processor = MORE[family]()
    return model.double().requires_grad_(False), Encoder(processor, config=model.config)


@cache
def base(family: str) -> Path:
    """The family's model, in float32, and its processor on disk, shared by all tests: read only."""
    folder, (model, encoder) = Path(mkdtemp()) / family, known(family)
    copy.deepcopy(model).float().save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder
