"""A model that brings its own Python code: the small one of examples/, at a tiny size."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CHATML, prompts, save, tokenizer
from transformers import EfficientNetConfig, LlamaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safe_rlhf_v.planning.footprint import meta_model
from safe_rlhf_v.vlm.backbone import encode_images, hidden_states, load_backbone
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from safe_rlhf_v.vlm.source import TRUST, ModelError

EXAMPLE = Path(__file__).parents[2] / "examples" / "small_vlm"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from modeling_lite_llava import LiteLlavaConfig, LiteLlavaForConditionalGeneration

    tok = tokenizer(["<image>"])
    eyes = EfficientNetConfig(
        width_coefficient=0.1, depth_coefficient=0.1, image_size=64, hidden_act="relu6", hidden_dim=128, hidden_size=128
    )
    text = LlamaConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
    )  # fmt: skip
    config = LiteLlavaConfig(
        vision_config=eyes, text_config=text, image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=4, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    LiteLlavaConfig.register_for_auto_class()
    LiteLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    torch.manual_seed(0)
    model = LiteLlavaForConditionalGeneration(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    side = {"height": 64, "width": 64}
    pixels = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    processor: Any = LlavaProcessor(
        image_processor=pixels, tokenizer=tok, patch_size=32, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, image_token="<image>", chat_template=CHATML.replace("IMAGE", "<image>"),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("load", [load_backbone, lambda path: meta_model(path, "float32")])
def test_code_runs_only_where_the_environment_trusts_it(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRUST, raising=False)
    with pytest.raises(ModelError, match=rf"base: brings Python code of its own.*{TRUST}=1"):
        load(folder)
    monkeypatch.setenv(TRUST, "1")
    assert load(folder).config.model_type == "lite_llava"


def test_a_convolutional_tower_stays_as_it_was_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode a batch's statistics would stand in for the learned ones: features would change, and buffers."""
    monkeypatch.setenv(TRUST, "1")
    model = load_backbone(folder)
    encoder = Encoder(load_processor(folder), config=model.config)
    inputs = encoder.prompts(prompts())
    pixels = hidden_states(model, inputs)
    model.train()
    assert torch.allclose(hidden_states(model, inputs), pixels, atol=1e-5)
    assert torch.allclose(hidden_states(model, encode_images(model, inputs)), pixels, atol=1e-5)


def test_a_saved_model_keeps_its_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST, "1")
    model = load_backbone(folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_lite_llava.py").is_file()
    again = load_backbone(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_processor_that_is_put_together_by_hand_runs_no_code_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, and take a "y" from any pipe."""
    save("qwen2_5_vl", tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    config = json.loads(file.read_text())
    pictures = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(pictures))
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "image_processor"}))
    (tmp_path / "model" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match=TRUST):
        load_processor(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
