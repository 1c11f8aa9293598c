"""Damaged files of weights are named before a tensor is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.preflight import preflight
from safe_rlhf_v.vlm.processing import load_processor
from safe_rlhf_v.vlm.source import ModelError
from safe_rlhf_v.vlm.weights import DamagedFile, read_torch, require_complete, weight_shapes

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 97616\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20000])


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def sharded(folder: Path, index: str) -> None:
    weights(folder).rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


def edited(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (lambda m: weights(m).write_text(POINTER), "model.safetensors is a git-lfs pointer.*git lfs pull"),
    "cut": (lambda m: cut(weights(m)), r"model.safetensors is cut short.*20,000 of"),
    "empty": (lambda m: weights(m).write_bytes(b""), "model.safetensors is empty"),
    "noise": (lambda m: weights(m).write_bytes(b"\x05" + b"\0" * 7 + b"x" * 99), "is damaged: its header"),
    "missing shard": (
        lambda m: sharded(m, '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'),
        "lacks two.safetensors, which model.safetensors.index.json names",
    ),
    "index of nothing": (lambda m: sharded(m, "[]"), "has no weight_map"),
    "index empty": (lambda m: sharded(m, ""), "index.json is empty"),
    "config empty": (lambda m: (m / "config.json").write_text(""), "model"),
    "config without a text section": (lambda m: edited(m, "text_config", None), "embedding is .* x .* in the weights"),
    "config of words": (lambda m: edited(m, "text_config", "x"), "not a vision-language model"),
    "config of no model": (lambda m: (m / "config.json").write_text("[]"), "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_model_that_is_not_whole_is_one_sentence(model: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(model)
    with pytest.raises(ModelError, match=words) as error:
        load_backbone(model)
    assert "\n" not in str(error.value) and str(model) in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_damaged_processor_is_one_sentence(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    with pytest.raises(ModelError) as error:
        load_processor(model)
    assert "\n" not in str(error.value) and str(model) in str(error.value)


@pytest.mark.parametrize("template", ["hello", "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_chat_template_that_drops_the_question_is_refused(model: Path, template: str) -> None:
    preflight(model)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="lacks the question"):
        preflight(model)


def test_a_missing_package_is_asked_for(model: Path) -> None:
    for file in model.glob("*.json"):
        file.write_text(file.read_text().replace("LlavaProcessor", "OmDetTurboProcessor"))
    with pytest.raises(ModelError, match="needs the package torchvision: pip install torchvision"):
        load_processor(model)


def test_shapes_come_from_headers(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    assert weight_shapes(whole) == {name: list(value.shape) for name, value in tensors.items()}
    assert weight_shapes("some/hub-id") == {}


@pytest.mark.parametrize(
    "file", ["heads.safetensors", "adapter_model.safetensors", "headed.json", "adapter_config.json"]
)
def test_a_damaged_scoring_model_is_named(whole: Path, tmp_path: Path, file: str) -> None:
    from safe_rlhf_v.vlm.adapters import LoraSettings

    HeadedModel(load_backbone(whole), {"score": 1}, LoraSettings(r=2)).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:20])
    with pytest.raises(ValueError, match=file):
        HeadedModel.from_pretrained(tmp_path)


def test_a_moved_run_finds_the_base_that_moved_with_it(whole: Path, tmp_path: Path) -> None:
    from safe_rlhf_v.vlm.adapters import LoraSettings

    shutil.copytree(whole, tmp_path / "old" / "sft")
    HeadedModel(load_backbone(tmp_path / "old" / "sft"), {"score": 1}, LoraSettings(r=2)).save_pretrained(
        tmp_path / "old" / "cost"
    )
    (tmp_path / "old").rename(tmp_path / "new")
    assert HeadedModel.from_pretrained(tmp_path / "new" / "cost").heads["score"].out_features == 1


def test_files_of_torch_are_told_by_their_end(tmp_path: Path) -> None:
    file = tmp_path / "rng.pt"
    torch.save({"x": torch.arange(1000)}, file)
    assert read_torch(file)["x"].sum() == 499_500
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DamagedFile, match="rng.pt is cut short"):
        require_complete(file)
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    require_complete(tmp_path / "x.safetensors")
