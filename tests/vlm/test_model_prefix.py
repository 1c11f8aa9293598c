"""Prompts that rows share are read once, and no result changes for it."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from more_families import ALL, known
from tiny_models import FAMILIES, prompts

from safe_rlhf_v.planning.allocations import Allocations
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm import like_length
from safe_rlhf_v.vlm.backbone import encode_images, hidden_states
from safe_rlhf_v.vlm.collation import distinct
from safe_rlhf_v.vlm.memory import recompute_language
from safe_rlhf_v.vlm.shared_prompts import can_share_prompts, reads_once, response_states

families = pytest.mark.parametrize("family", FAMILIES)
ROWS = [3, 0, 0, 1, 3, 2, 0, 2]  # of four prompts, in no order


def batch(family: str, featured: bool) -> tuple[Any, Inputs, Responses]:
    model, encoder = known(family)
    inputs = encoder.prompts(prompts())
    inputs = (encode_images(model, inputs) if featured else inputs).select(ROWS)
    texts = ["I cannot help with that.", "a", "first take the key", "no", "", "a b c", "the lock", "it is red"]
    return model, inputs, encoder.responses(texts)


@families
@pytest.mark.parametrize("featured", [False, True])
def test_states_are_those_of_whole_sequences(family: str, featured: bool) -> None:
    model, inputs, responses = batch(family, featured)
    seen: list[tuple[int, ...]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with torch.no_grad():
        found = response_states(model, inputs, responses)
        whole = hidden_states(model, inputs, responses)
    hook.remove()
    width, length = inputs.input_ids.shape[1], responses.ids.shape[1]
    assert seen == [(4, width - 1), (8, length + 1), (8, width + length)]
    mask = torch.cat([torch.ones(8, 1, dtype=torch.bool), responses.mask], dim=1)
    torch.testing.assert_close(found[mask], whole[:, width - 1 :][mask], rtol=1e-5, atol=1e-5)


def gradients(model: Any, states: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of some function of the response's states, by language parameter."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask[..., None], 0.0)
    named = [(n, p) for n, p in model.get_decoder().named_parameters() if p.requires_grad]
    found = torch.autograd.grad((states * weights).sum(), [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


@families
def test_gradients_are_those_of_whole_sequences(family: str) -> None:
    model, _ = FAMILIES[family]()
    _, inputs, responses = batch(family, True)
    seen: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    with torch.enable_grad():
        found = response_states(model, inputs, responses)
        once = response_states(model, inputs, responses, one_forward=True)
        whole = hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :]
    hook.remove()
    assert seen == [4, 8, 8, 8]
    assert torch.equal(once, whole)
    mask = torch.cat([torch.ones(8, 1, dtype=torch.bool), responses.mask], dim=1)
    shared, expected = gradients(model, found, mask), gradients(model, whole, mask)
    assert shared.keys() == expected.keys() and len(shared) > 5
    assert all(g.abs().max() > 0 for g in expected.values())
    for name, gradient in expected.items():
        off = (shared[name] - gradient).abs().max() / gradient.abs().max()
        assert off < 1e-4, (name, off)


@families
@pytest.mark.parametrize("rows", [range(8), [0, 1, 3, 5]])  # prompts that rows share, and one for each row
def test_short_responses_do_not_compute_the_pads_of_long_ones(
    family: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(like_length, "PASS", 0)
    model, _ = FAMILIES[family]()
    _, inputs, responses = batch(family, True)
    inputs, responses = inputs.select(rows), responses.select(rows)
    lengths = responses.mask.sum(1)
    seen: list[tuple[int, ...]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with torch.enable_grad():
        found = response_states(model, inputs, responses)
        whole = hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :]
    hook.remove()
    counted = {int(n) + 1: int((lengths == n).sum()) for n in lengths}
    assert {width: count for count, width in seen[1:-1]} == counted, "as many passes as there are lengths"
    mask = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), responses.mask], dim=1)
    torch.testing.assert_close(found[mask], whole[mask], rtol=1e-5, atol=1e-5)
    parts, expected = gradients(model, found, mask), gradients(model, whole, mask)
    for name, gradient in expected.items():
        off = (parts[name] - gradient).abs().max() / gradient.abs().max()
        assert off < 1e-4, (name, off)


def test_rows_are_parted_where_it_saves_more_than_a_pass_costs() -> None:
    def parts(*lengths: int, device: str = "cpu") -> list[list[int]]:
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return like_length.of_like_length(Responses(ids=mask.long().to(device), mask=mask.to(device)))

    assert parts(5, 40, 6) == [[0, 1, 2]], "69 pads"
    assert parts(*[5] * 9, 40, *[6] * 9) == [[9], [*range(10, 19), *range(9)]]
    many = parts(*[5] * 99, *[20] * 50, *[40] * 20)
    assert [len(part) for part in many] == [20, 50, 99] and sorted(i for part in many for i in part) == list(range(169))
    assert parts(7) == [[0]]
    assert parts(*[5] * 9, 40, *[6] * 9, device="meta") == [list(range(19))], "not on an accelerator"


@pytest.mark.parametrize("family", sorted(ALL.keys() - {"mllama"}))
def test_a_model_that_recomputes_activations_reads_prompts_once_too(family: str) -> None:
    """transformers drops the cache of a layer that recomputes, unless told not to; and a layer then runs twice."""
    model, _ = ALL[family]()
    _, inputs, responses = batch(family, True)
    mask = torch.cat([torch.ones(8, 1, dtype=torch.bool), responses.mask], dim=1)

    def ask() -> torch.Tensor:
        return response_states(model, inputs, responses)

    expected = hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :]
    wanted = gradients(model, expected, mask)
    runs: list[int] = []
    attention = model.get_decoder().layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    recompute_language(model)
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(ask()[mask], expected.detach()[mask])
    found = ask()
    assert runs == [4, 8, 4, 8] and model.training
    again = gradients(model, found, mask)
    hook.remove()
    assert sorted(runs[4:]) == [4, 8], "the layer ran again for its activations"
    torch.testing.assert_close(found[mask], expected[mask])
    for name, gradient in wanted.items():
        assert (again[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_a_pass_given_up_leaves_nothing_behind() -> None:
    """With recomputed activations a graph holds the cache of its pass, whose keys must not hold the graph."""
    model, _ = FAMILIES["llava"]()
    _, inputs, responses = batch("llava", True)
    recompute_language(model)
    with Allocations(held=list(model.parameters())) as seen:
        for _ in range(2):  # the first time sees buffers that stay
            before = seen.live
            states = response_states(model, inputs, responses)
            during = seen.live
            del states
            gc.collect()
        assert before == seen.live < during
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.get_decoder().layers[1], "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                response_states(model, inputs, responses)
        gc.collect()
        assert seen.live == before


def test_a_family_whose_prompts_cannot_be_read_once_says_so() -> None:
    model, inputs, _ = batch("mllama", False)
    assert not reads_once(model, inputs.select([0, 1, 1]))
    model, inputs, _ = batch("llava", False)
    assert reads_once(model, inputs)


def test_a_model_in_train_mode_by_other_hands_reads_whole_sequences() -> None:
    """Its layers would drop their caches: the samples would forget their prompts."""
    model, _ = FAMILIES["llava"]()
    _, inputs, responses = batch("llava", False)
    model.get_decoder().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    found = response_states(model, inputs, responses)
    assert torch.equal(found, hidden_states(model, inputs, responses)[:, inputs.input_ids.shape[1] - 1 :])


def test_prompts_are_told_apart_by_tokens_and_pictures() -> None:
    _, inputs, _ = batch("llava", False)
    assert distinct(inputs) == ([0, 1, 3, 5], [0, 1, 1, 2, 0, 3, 1, 3])
    alike = inputs.select([1, 2])  # one prompt twice; then with another picture
    assert distinct(alike) == ([0], [0, 0])
    assert distinct(replace(alike, image_keys=("a", "b"))) == ([0, 1], [0, 1])
    assert distinct(replace(alike, image_keys=(), vision=({}, {}))) == ([0, 1], [0, 1])


def test_prompts_that_end_in_a_picture_are_read_with_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = batch("llava", False)
    assert can_share_prompts(model, inputs)
    monkeypatch.setattr(model.config, "image_token_index", int(inputs.input_ids[0, -1]))
    assert not can_share_prompts(model, inputs)
