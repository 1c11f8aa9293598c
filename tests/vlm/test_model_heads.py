"""Heads read the last attended token, train only what they should, and survive saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, loaded, prompts, save
from torch import nn

from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import LoraSettings, freeze_vision, hidden_states, load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel

families = pytest.mark.parametrize("family", FAMILIES)
LORA = LoraSettings(r=2)
TEXTS = ["I cannot help with that.", "a", "first take the key, then turn it.", ""]


def batch(family: str) -> tuple[Inputs, Responses]:
    _, encoder = loaded(family)
    return encoder.prompts(prompts()), encoder.responses(TEXTS)


def shaken(model: HeadedModel) -> HeadedModel:
    """Adapters moved off zero, as training would."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@families
def test_mistake_1_the_score_is_not_taken_from_a_pad(family: str) -> None:
    model = HeadedModel(FAMILIES[family]()[0], {"reward": 1, "harm": 3}).eval()
    _, encoder = loaded(family)
    inputs, responses = batch(family)
    scores = model(inputs, responses)
    assert scores["reward"].shape == (4, 1) and scores["harm"].shape == (4, 3)
    for i, prompt in enumerate(prompts()):
        alone = model(encoder.prompts([prompt]), encoder.responses([TEXTS[i]]))
        for name in scores:
            torch.testing.assert_close(scores[name][i : i + 1], alone[name], rtol=1e-5, atol=1e-5)
    at_minus_one = model.heads["reward"](hidden_states(model.backbone, inputs, responses)[:, -1])
    wrong = (at_minus_one - scores["reward"]).abs().flatten()
    assert wrong[2] < 1e-5 < wrong[[0, 1, 3]].min(), "position -1 is right for the longest row only"


@families
def test_a_prompt_is_read_once_for_both_its_responses(family: str) -> None:
    """Also with adapters and heads that take gradients; cut models read it with each."""
    model = shaken(HeadedModel(FAMILIES[family]()[0], {"score": 1}, LORA))
    _, encoder = loaded(family)
    inputs, responses = encoder.prompts(prompts()).repeat(2), encoder.responses(TEXTS + TEXTS[::-1])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    read: list[int] = []
    model.backbone.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    found = []
    for one_forward in (False, True):
        model.one_forward = one_forward
        scores = model(inputs, responses)["score"]
        loss = -nn.functional.logsigmoid(scores.view(-1, 2).diff(dim=1)).mean()
        found.append((scores, torch.autograd.grad(loss, list(trained.values()))))
    assert read == [4, 8, 8]
    (once, gradients), (whole, expected) = found
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-5)
    for name, got, wanted in zip(trained, gradients, expected, strict=True):
        assert wanted.abs().max() > 0, name
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_scores_are_float32_under_autocast() -> None:
    """bfloat16 has eight bits: two responses whose scores differ by half a percent would tie."""
    model = HeadedModel(FAMILIES["llava"]()[0], {"score": 1}).eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(*batch("llava"))["score"]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@families
def test_prompts_alone_are_scored_on_their_last_token(family: str) -> None:
    model = HeadedModel(FAMILIES[family]()[0], {"query": 2}).eval()
    inputs, _ = batch(family)
    expected = model.heads["query"](hidden_states(model.backbone, inputs)[:, -1])  # left-padded: the last token is last
    torch.testing.assert_close(model(inputs)["query"], expected, rtol=0, atol=0)


@families
def test_gradients_reach_adapters_and_heads_only(family: str) -> None:
    model = shaken(HeadedModel(FAMILIES[family]()[0], {"reward": 1}, LORA))
    sum(s.sum() for s in model(*batch(family)).values()).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {n for n, p in model.named_parameters() if p.requires_grad}
    assert touched == {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("heads.")}


def test_full_training_leaves_the_frozen_tower_alone() -> None:
    model = HeadedModel(FAMILIES["llava"]()[0], {"reward": 1})
    freeze_vision(model.backbone)
    model(*batch("llava"))["reward"].sum().backward()
    without = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is None}
    assert without == {"vision_tower", "multi_modal_projector", "weight"}, "and the unused output layer"


@families
@pytest.mark.parametrize("lora", [None, LORA])
def test_what_is_saved_comes_back(family: str, lora: LoraSettings | None, tmp_path: Path) -> None:
    base = save(family, tmp_path / "base")
    model = shaken(HeadedModel(load_backbone(base), {"reward": 1, "harm": 3}, lora, bias=True)).eval()
    model.save_pretrained(tmp_path / "saved")
    again = HeadedModel.from_pretrained(tmp_path / "saved")
    expected, scores = model(*batch(family)), again(*batch(family))
    for name in expected:
        assert torch.equal(scores[name], expected[name])
    trainable = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}  # noqa: E731
    assert trainable(again) == trainable(model)
    again.save_pretrained(tmp_path / "twice")
    twice = HeadedModel.from_pretrained(tmp_path / "twice")
    assert all(torch.equal(twice(*batch(family))[name], expected[name]) for name in expected)


def test_the_adapter_of_a_headed_model_is_plain_peft_and_any_base_object_serves(tmp_path: Path) -> None:
    base = save("llava", tmp_path / "base")
    model = shaken(HeadedModel(load_backbone(base), {"reward": 1}, LORA)).eval()
    model.save_pretrained(tmp_path / "saved", loaded("llava")[1].processor)
    inputs, responses = batch("llava")
    peft = PeftModel.from_pretrained(load_backbone(base), tmp_path / "saved").base_model.model.eval()
    expected = hidden_states(model.backbone, inputs, responses)
    torch.testing.assert_close(hidden_states(peft, inputs, responses), expected, rtol=0, atol=0)
    again = HeadedModel.from_pretrained(tmp_path / "saved", base=load_backbone(base))
    assert torch.equal(again(inputs, responses)["reward"], model(inputs, responses)["reward"])


def test_lost_heads_are_an_error_that_names_them(tmp_path: Path) -> None:
    base = save("llava", tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="headed.json"):
        HeadedModel.from_pretrained(base)
    model = HeadedModel(load_backbone(base), {"reward": 1, "harm": 3}, LORA)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    weights = load_file(folder / "heads.safetensors")
    save_file({"reward.weight": weights["reward.weight"]}, folder / "heads.safetensors")
    with pytest.raises(ValueError, match="harm"):
        HeadedModel.from_pretrained(folder)
    (folder / "heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"heads\.safetensors"):
        HeadedModel.from_pretrained(folder)


def test_a_processor_is_saved_beside_or_asked_for(tmp_path: Path) -> None:
    model = HeadedModel(FAMILIES["llava"]()[0], {"reward": 1}, LORA)
    with pytest.raises(ValueError, match="pass processor="):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", loaded("llava")[1].processor)
    assert (tmp_path / "saved" / "processor_config.json").is_file()


def test_an_adapter_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    base = save("llava", tmp_path / "base")
    folder = tmp_path / "saved"
    HeadedModel(load_backbone(base), {"reward": 1}, LORA).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        HeadedModel.from_pretrained(folder)


def test_heads_stay_in_float32_on_a_half_precision_backbone(tmp_path: Path) -> None:
    base = save("llava", tmp_path / "base")
    model = HeadedModel(load_backbone(base, dtype="bfloat16"), {"reward": 1}, LORA)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    scores = model(*batch("llava"))["reward"]
    assert scores.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "headed.json").read_text())["heads"] == {"reward": 1}
    again = HeadedModel.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(again(*batch("llava"))["reward"], scores, rtol=0, atol=0)
