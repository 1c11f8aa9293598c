"""config.json of the models that the recipes name: their shapes alone, as published with them; no weights."""

from __future__ import annotations

from pathlib import Path

from transformers import Idefics3Config, LlavaConfig, PretrainedConfig, Qwen2_5_VLConfig


def qwen2_5_vl(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool
) -> PretrainedConfig:
    text = dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=128_000,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden, patch_size=14,
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def llava_1_5() -> PretrainedConfig:
    text = dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32_064,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(text_config=text, vision_config=vision, image_token_id=32_000)


def smolvlm() -> PretrainedConfig:
    text = dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49_280, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
        patch_size=16,
    )  # fmt: skip
    return Idefics3Config(text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False)


SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: qwen2_5_vl(2048, 11_008, 36, 16, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: qwen2_5_vl(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "llava-hf/llava-1.5-7b-hf": llava_1_5,
    "HuggingFaceTB/SmolVLM-256M-Instruct": smolvlm,
}
# parameters as the models' cards give them, billions
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 0.256,
}


def save(name: str, folder: Path, layers: int | None = None) -> Path:
    """A folder with the model's config.json and nothing else. layers: of the language model, in place of all."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]()
    if layers:
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.save_pretrained(folder)
    return folder
