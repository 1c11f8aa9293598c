"""Options that trade memory and time: where they apply, and what is said where they cannot."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, loaded, prompts

from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.vlm.backbone import hidden_states
from safe_rlhf_v.vlm.memory import apply_liger, checkpoint_gradients, compile_layers
from safe_rlhf_v.vlm.source import ModelError


def checkpointed(module: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [False, True, "language", "vision"])
def test_language_and_vision_are_checkpointed_apart(family: str, which: Any) -> None:
    model, _ = FAMILIES[family]()
    checkpoint_gradients(model, which)
    assert checkpointed(model.get_decoder()) == (which in (True, "language"))
    assert checkpointed(model.get_encoder(modality="image")) == (which in (True, "vision"))


def test_settings_that_save_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match="a frozen vision tower keeps no activations"):
        load_settings(None, ["reward.gradient_checkpointing=vision"])
    settings = load_settings(None, ["sft.gradient_checkpointing=vision", "sft.freeze_vision=false"])
    assert settings.sft.gradient_checkpointing == "vision"
    assert load_settings(None, ["reward.gradient_checkpointing=true"]).reward.gradient_checkpointing is True
    with pytest.raises(SettingsError, match="engine.kind vllm needs roles: adapters"):
        load_settings(None, ["policy.engine.kind=vllm", "policy.roles=separate"])


def test_compiled_layers_give_the_same_states() -> None:
    """Captured by dynamo and run as they are: inductor itself needs a compiler and minutes."""
    plain, encoder = loaded("llava")
    model = FAMILIES["llava"]()[0].double()
    inputs = encoder.prompts(prompts())
    compile_layers(model, backend="eager")
    assert all(layer._compiled_call_impl is not None for layer in model.get_decoder().layers)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(model, inputs), hidden_states(plain, inputs))
    assert model.state_dict().keys() == plain.state_dict().keys(), "names stay, so checkpoints and adapters fit"


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = FAMILIES["llava"]()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=r"policy\.torch_compile needs a C\+\+ compiler"):
        compile_layers(model)


def test_liger_is_applied_without_its_losses_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = FAMILIES["llava"]()
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ModelError, match=r"policy\.use_liger_kernel needs liger-kernel"):
            apply_liger(model)
    applied: list[dict[str, Any]] = []
    patches = {"liger_kernel": {}, "liger_kernel.transformers": {}, "liger_kernel.transformers.monkey_patch": {}}
    patches["liger_kernel.transformers"] = {"_apply_liger_kernel_to_instance": lambda **kw: applied.append(kw)}
    patches["liger_kernel.transformers.monkey_patch"] = {"MODEL_TYPE_TO_APPLY_LIGER_FN": {"llava": None}}
    for name, members in patches.items():
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    apply_liger(model)
    assert applied == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    other, _ = FAMILIES["idefics3"]()
    with pytest.raises(ModelError, match="has no kernels for model type idefics3"):
        apply_liger(other)
