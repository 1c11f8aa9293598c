"""A 4-bit backbone under float32 adapters (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from more_families import ALL, base
from peft import PeftModel
from tiny_models import prompts

from safe_rlhf_v.generation import Sampling
from safe_rlhf_v.roles.protocol import AdapterRoles
from safe_rlhf_v.vlm.backbone import LoraSettings, hidden_states, load_backbone

bnb = pytest.importorskip("bitsandbytes")
LORA = LoraSettings(r=2)


@pytest.mark.capability("4-bit")
@pytest.mark.parametrize("family", ALL)
def test_adapters_train_on_a_4_bit_backbone(family: str, tmp_path: Path) -> None:
    """The reference is the 4-bit backbone itself; a step moves the policy alone; what is saved is a plain adapter."""
    roles = AdapterRoles.from_pretrained(base(family), critics=False, lora=LORA, quantization="4bit")
    packed = [m for m in roles.backbone.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert packed and all(m.weight.dtype == torch.uint8 for m in packed)
    inputs = roles.encoder.prompts(prompts())
    responses = roles.generate(inputs, 1, Sampling(max_new_tokens=3))
    reference = roles.logps(inputs, responses, "reference")
    logps = roles.logps(inputs, responses)
    assert torch.equal(logps, reference), "a fresh adapter changes nothing"
    logps[responses.mask].sum().backward()
    touched = {name for name, p in roles.backbone.named_parameters() if p.grad is not None}
    assert touched and all(".lora_" in name for name in touched)
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            assert parameter.dtype == torch.float32
            parameter += 1e-3 * torch.sign(parameter.grad)
    moved = roles.logps(inputs, responses)
    assert moved[responses.mask].sum() > logps[responses.mask].sum()
    assert torch.equal(roles.logps(inputs, responses, "reference"), reference)
    roles.save_policy(tmp_path)
    again = PeftModel.from_pretrained(load_backbone(base(family), quantization="4bit"), tmp_path).eval()
    states = [hidden_states(m, inputs) for m in (roles._as("policy"), again.base_model.model)]
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(states[0][real], states[1][real], rtol=1e-5, atol=1e-5)


def test_the_exact_weights_are_merged_not_the_4_bit_ones(tmp_path: Path) -> None:
    """What QLoRA trained is added to the full-precision base: merging into 4 bits would round the change away."""
    roles = AdapterRoles.from_pretrained(base("llava"), critics=False, lora=LORA, quantization="4bit")
    for parameter in roles.policy_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    roles.save_policy(tmp_path)
    merged, exact = (dict(load_backbone(x).named_parameters()) for x in (tmp_path, base("llava")))
    name = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (roles.backbone.get_parameter(f"{name}.lora_{x}.policy.weight") for x in "AB")
    scale = LORA.alpha / LORA.r
    torch.testing.assert_close(merged[f"{name}.weight"], exact[f"{name}.weight"] + scale * b @ a)
