"""A LLaVA of about a million parameters with a word-level tokenizer: the model of the picture world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from beavertails_v.picture_world import vocabulary

SHIPPED_START = Path(__file__).parent / "assets" / "picture_world_start.safetensors"

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' else '' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{{ ' ' }}{% endfor %}{% endif %}"
    "{{ ' </s> ' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %} answer : {% endif %}"
)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, lower case; marks are words of their own; unknown words become <unk>."""
    vocabulary = {
        w: i for i, w in enumerate([*SPECIAL, *(w for w in dict.fromkeys([*words, "answer", ":"]) if w not in SPECIAL)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    fast.padding_side = "left"
    return fast


def tiny_llava(
    words: Sequence[str],
    *,
    image_size: int = 64,
    patch_size: int = 16,
    hidden_size: int = 128,
    layers: int = 4,
    vision_layers: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A fresh tiny LLaVA and its processor; (image_size / patch_size)^2 image tokens a picture."""
    tokenizer = word_tokenizer(words)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        projection_dim=hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_id,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    side = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, do_convert_rgb=True),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


def picture_world_model(
    *, start: str | Path | None = None, tower: str | Path | None = None, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The picture world's model: from `start` (it sees and names), or from a `tower` alone (it sees and says nothing).

    Both are files, or folders with start.safetensors / tower.safetensors, made by `safe-rlhf-v train start`. Raises
    FileNotFoundError where there is none.
    """
    model, processor = tiny_llava(vocabulary(), layers=3, seed=seed)
    source, name = (start, "start") if tower is None else (tower, "tower")
    file = Path(SHIPPED_START if source is None else source)
    file = file / f"{name}.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such weights; make them with `safe-rlhf-v train start FOLDER`")
    weights = {key: value.float() for key, value in load_file(file).items()}
    if tower is not None:
        model.model.vision_tower.load_state_dict(weights)
    else:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # tied to the embedding, so not saved
            raise ValueError(
                f"{file} does not fit the picture world's model: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        model.tie_weights()
    return model, processor


def write_picture_world_model(folder: str | Path, *, start: str | Path | None = None) -> Path:
    """Save the start model (the one that ships, or `start`) with its processor to `folder`."""
    model, processor = picture_world_model(start=start)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
