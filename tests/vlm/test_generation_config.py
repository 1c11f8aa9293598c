"""A generation_config.json that cannot be used is said before weights are read; one that can, can be saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from transformers import GenerationConfig

from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.generation_config import FILE, require_generation_config
from safe_rlhf_v.vlm.preflight import preflight
from safe_rlhf_v.vlm.source import ModelError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("model") / "llava")


def write(folder: Path, values: Any) -> Path:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    (folder / FILE).write_bytes(text)
    return folder


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (b"", "is empty"),
        (b"{", "is no JSON"),
        (b'{"eos_token_id": "\xff"}', "is no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no JSON"),
        ([1], "should hold a JSON object"),
        (None, "should hold a JSON object"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' should be the id of a token, or a list of ids"),
        ({"eos_token_id": [2, "3"]}, r"eos_token_id = \[2, '3'\] should be"),
        ({"eos_token_id": 2.5}, "eos_token_id = 2.5 should be"),
        ({"bos_token_id": True}, "bos_token_id = True should be the id of a token"),
        ({"pad_token_id": [1]}, r"pad_token_id = \[1\] should be the id of a token"),
        ({"max_new_tokens": "many"}, "max_new_tokens = 'many' should be a whole number"),
        ({"do_sample": "yes"}, "do_sample = 'yes' should be true or false"),
        ({"do_sample": True, "temperature": "warm"}, "temperature = 'warm' should be a number"),
        ({"cache_implementation": "mine"}, "Invalid `cache_implementation`"),
        ({"num_return_sequences": 4}, "num_return_sequences"),
    ],
)
def test_one_that_cannot_be_used_is_one_sentence(tmp_path: Path, values: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        require_generation_config(write(tmp_path, values))
    assert "\n" not in str(error.value) and str(tmp_path / FILE) in str(error.value)


def test_it_is_said_before_weights_are_read(whole: Path, tmp_path: Path) -> None:
    folder = write(Path(shutil.copytree(whole, tmp_path / "model")), b"{")
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-8:] = b"\xff" * 8
    file.write_bytes(raw)
    for look in (preflight, load_backbone):
        with pytest.raises(ModelError, match=FILE):
            look(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2},
        {"do_sample": False, "top_k": 20},
        {"pad_token_id": -1, "output_scores": True},
        {"length_penalty": 2.0, "early_stopping": True},
    ],
)
def test_what_transformers_loads_and_would_not_save_is_saved(whole: Path, tmp_path: Path, values: Any) -> None:
    folder = write(Path(shutil.copytree(whole, tmp_path / "model")), values)
    with pytest.raises(ValueError, match="invalid"):
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    preflight(folder)
    load_backbone(folder).save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == values.get("eos_token_id")


def test_settings_that_have_an_effect_stay(whole: Path, tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [2, 3]}
    load_backbone(write(Path(shutil.copytree(whole, tmp_path / "model")), values)).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / FILE).read_text())
    assert {name: saved[name] for name in values} == values
