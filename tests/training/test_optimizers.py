"""Optimizers by transformers' names, those of bitsandbytes among them, and QLoRA through a supervised stage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import comparisons
from more_families import base
from sections import of
from torch import nn
from transformers import AutoModelForImageTextToText

from safe_rlhf_v.config import Optimizer, SettingsError, load_settings
from safe_rlhf_v.online.arguments import OnlineArguments
from safe_rlhf_v.online.updates import BITSANDBYTES, Trained, adamw
from safe_rlhf_v.training.supervised import train_sft

NAMES = Optimizer.__args__  # type: ignore[attr-defined]


def trained(name: str) -> Trained:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 4096)), nn.Parameter(torch.ones(3))]  # 8 bits from 4096 on
    return Trained("policy", parameters, OnlineArguments(output_dir="unused", optim=name), 0.01)


def step(which: Trained) -> list[torch.Tensor]:
    """One step towards 0, without an accelerator: the gradients of half the squared norm."""
    for parameter in which.parameters:
        parameter.grad = parameter.detach().clone()
    which.optimizer.step()
    return [p.detach().clone() for p in which.parameters]


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_is_adamw_and_resumes(name: str) -> None:
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    first, plain, resumed = trained(name), trained("adamw_torch"), trained(name)
    for ours, expected in zip(step(first), step(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)  # of a step of 0.01: 8 bits round the moments
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    for mine, theirs in zip(resumed.parameters, first.parameters, strict=True):
        mine.data.copy_(theirs)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for ours, expected in zip(step(resumed), step(first), strict=True):
        assert torch.equal(ours, expected)


def test_a_wrong_name_or_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="should be one of adamw_torch"):
        adamw("sgd")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install bitsandbytes"):
        adamw("adamw_bnb_8bit")
    assert set(BITSANDBYTES) == set(NAMES) - {"adamw_torch", "adamw_torch_fused"}


def test_qlora_sft_saves_a_whole_exact_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    chosen = ["max_steps=2", "learning_rate=1e-2", "use_lora=true", "optim=adamw_bnb_8bit"]
    settings = load_settings(None, [*(f"sft.{x}" for x in chosen), "model.quantization=4bit", "model.lora.r=2"])
    train_sft(comparisons(4), comparisons(4), base("llava"), tmp_path, *of(settings, "sft"))
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    before = dict(AutoModelForImageTextToText.from_pretrained(base("llava")).named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 14 and all("language_model.layers" in name for name in changed), "seven maps in two layers"
    assert all(p.dtype == torch.float32 for p in model.parameters())
