"""Six further families, tiny and random, that the library has no line of code for. Each gives (model, processor)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_models import CHATML, TEXT, _model, _trained, tokenizer
from tokenizers import Tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safe_rlhf_v.models.quirks import NoVideos

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


MORE: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f for f in (qwen2_vl, qwen3_vl, llava_next, llava_onevision, gemma3, internvl)
}
