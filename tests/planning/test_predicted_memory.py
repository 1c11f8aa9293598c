"""Predicted memory is what a stage takes, and is made of the parts it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

from benchmarks import memory as bench
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.planning import stages as memory
from safe_rlhf_v.planning.allocations import Allocations
from safe_rlhf_v.planning.footprint import QUANTIZED, Step, sizes, step_peak
from safe_rlhf_v.vlm.adapters import LoraSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and no weights."""
    model, _ = tiny_models.llava()
    folder = tmp_path_factory.mktemp("config")
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", ["reward, adapters", "policy, adapters, no critics"])
def test_the_prediction_is_within_15_percent_of_what_the_stage_takes(tmp_path: Path, case: str) -> None:
    found = bench.measure(case, tmp_path)
    assert found.predicted == pytest.approx(found.tensors, rel=0.15)


def test_allocations_by_hand() -> None:
    held = torch.zeros(10)  # 40 bytes
    with Allocations(held=[held]) as seen:
        a = torch.zeros(100)  # 400
        b = a + 1  # 400 more
        a.add_(1)  # nothing
        view = a[:50]  # nothing
        assert seen.live == 840
        del a
        assert seen.live == 840  # the view holds it
        del view
        c = b * 2
        assert (seen.live, seen.peak) == (840, 840)
        del b, c
    assert (seen.live, seen.peak) == (40, 840)


def test_allocations_see_what_the_backward_pass_keeps_and_makes() -> None:
    weight = torch.zeros(8, 8, requires_grad=True)  # 256 bytes
    with Allocations(held=[weight]) as seen:
        loss = torch.tanh(torch.zeros(4, 8) @ weight).sum()
        loss.backward()
        assert weight.grad is not None
        del loss
    assert seen.live == 512  # the weight and its gradient


def test_sizes_are_those_of_the_model(base: Path) -> None:
    model, _ = tiny_models.llava()
    size = sizes(base, "float32", lora=LoraSettings(r=4))
    assert size.weights == 4 * sum(p.numel() for p in model.parameters())
    layer = model.model.language_model.layers[0]
    assert size.largest_layer == 4 * sum(p.numel() for p in layer.parameters())
    assert size.language - size.outside_layers == 2 * size.largest_layer
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert size.adapter == 2 * sum(4 * (m.in_features + m.out_features) for m in linears)
    assert size.cache_a_token == 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, their width, bytes


def test_quantization_shrinks_linear_layers_but_not_the_output_layer(base: Path) -> None:
    model, _ = tiny_models.llava()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head)
    plain, small = (sizes(base, "bfloat16", kind).weights for kind in (None, "4bit"))
    assert plain - small == pytest.approx(linear * (2 - QUANTIZED["4bit"]), rel=0.01)


def test_checkpointing_adapters_and_forwards_alone_take_less(base: Path) -> None:
    step = dict(rows=4, length=64, response=8)
    whole = step_peak(base, "float32", Step(loss="values", **step))
    assert step_peak(base, "float32", Step(loss="values", checkpointing=True, **step)) < 0.6 * whole
    assert step_peak(base, "float32", Step(loss="values", grad=False, **step)) < 0.4 * whole
    twice = step_peak(base, "float32", Step(loss="values", rows=8, length=64, response=8))
    assert 1.8 * whole < twice < 2.0 * whole  # all but the gradients


def test_sharding_divides_what_stands_and_not_the_tower(base: Path) -> None:
    settings = load_settings(None, [f"model.path={base}", "policy.roles=separate", "policy.max_new_tokens=8"])
    model = replace(memory.planned_model(settings.model, base, 32), response=8)
    one, eight = (memory.policy(settings.policy, model, devices, critics=True) for devices in (1, 8))
    assert eight.held["policy"] == pytest.approx(one.held["policy"] / 8, abs=1)
    assert eight.held["policy optimizer"] == 2 * eight.held["policy"]
    assert len(one.held) == 1 + 6 + 3  # the tower; six models; three optimizers
    assert eight.held["vision tower, shared"] == one.held["vision tower, shared"] / 2  # computed in bfloat16


def test_what_cannot_be_predicted_is_named(base: Path) -> None:
    with pytest.raises(SettingsError, match="--prompt-tokens"):
        memory.planned_model(load_settings(None, []).model, base)
    settings = load_settings(None, ["reward.optim=adafactor", "sft.freeze_vision=false"])
    model = memory.planned_model(settings.model, base, 8)
    with pytest.raises(SettingsError, match=r"optim 'adafactor'"):
        memory.supervised("reward", settings.reward, model)
    with pytest.raises(SettingsError, match="sft.freeze_vision"):
        memory.supervised("sft", settings.sft, model)
