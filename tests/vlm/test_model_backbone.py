"""Forwards without logits, feature reuse, freezing, adapters: all equal to what the plain model does."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from more_families import ALL, base, known
from peft import PeftModel
from tiny_models import FAMILIES, SAME, exact_states, loaded, picture, prompts, response_hidden, save, shake
from torch import nn
from transformers import AutoModelForImageTextToText

from beavertails_v.schema import Prompt
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm import backbone
from safe_rlhf_v.vlm.backbone import (
    LoraSettings,
    ScaledHead,
    adapter_parameters,
    add_lora,
    encode_images,
    fingerprint,
    freeze_vision,
    hidden_states,
    load_backbone,
    output_head,
    vision_is_frozen,
)
from safe_rlhf_v.vlm.heads import save_adapter
from safe_rlhf_v.vlm.image_features import VisionCache, split_features
from safe_rlhf_v.vlm.processing import join

families = pytest.mark.parametrize("family", FAMILIES)
every_family = pytest.mark.parametrize("family", ALL)
TEXTS = ["I cannot help with that.", "a", "first take the key, then turn it.", ""]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to float32 rounding; what the mistakes here cause is a thousand times larger."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, check_dtype=False)  # log-probabilities stay in float32


def attended(hidden: torch.Tensor, inputs: Inputs, responses: Responses) -> list[torch.Tensor]:
    mask = torch.cat([inputs.attention_mask.bool(), responses.mask], 1)
    return [h[m] for h, m in zip(hidden, mask, strict=True)]


@families
def test_hidden_states_are_those_the_models_own_logits_come_from(family: str) -> None:
    model, encoder = loaded(family)
    inputs, responses = encoder.prompts(prompts()), encoder.responses(TEXTS)
    own = model(**join(inputs, responses)).logits
    ours = output_head(model)(hidden_states(model, inputs, responses))
    for a, b in zip(attended(ours, inputs, responses), attended(own, inputs, responses), strict=True):
        close(a, b)


@pytest.mark.capability("batch = rows")
@every_family
def test_a_batch_equals_its_rows_alone(family: str) -> None:
    """Mixed numbers of pictures and of tokens: no row may feel its neighbours or its padding."""
    model, encoder = known(family)
    inputs, responses = encoder.prompts(prompts()), encoder.responses(TEXTS)
    together = attended(hidden_states(model, inputs, responses), inputs, responses)
    for i, prompt in enumerate(prompts()):
        row, reply = encoder.prompts([prompt]), encoder.responses([TEXTS[i]])
        alone = attended(hidden_states(model, row, reply), row, reply)[0]
        close(together[i], alone)


@pytest.mark.capability("padding")
@every_family
def test_mistake_9_padding_side_does_not_matter(family: str) -> None:
    """Positions follow the mask: extra pads on the left, in ids and extras alike, change nothing (M-RoPE included)."""
    model, encoder = known(family)
    inputs, responses = encoder.prompts(prompts()), encoder.responses(TEXTS)
    pad = lambda t, value: nn.functional.pad(t, (5, 0), value=value)  # noqa: E731
    wider = replace(
        inputs,
        input_ids=pad(inputs.input_ids, encoder.pad_id),
        attention_mask=pad(inputs.attention_mask, 0),
        token_extras={k: pad(v, 0) for k, v in inputs.token_extras.items()},
    )
    for a, b in zip(
        attended(hidden_states(model, inputs, responses), inputs, responses),
        attended(hidden_states(model, wider, responses), wider, responses),
        strict=True,
    ):
        close(a, b)
    if inputs.token_extras:  # on the other side they are anything but harmless, and nothing would say so
        shifted = replace(wider, token_extras={k: v.roll(-5, 1) for k, v in wider.token_extras.items()})
        difference = hidden_states(model, wider, responses) - hidden_states(model, shifted, responses)
        assert max(d.abs().max() for d in attended(difference, wider, responses)) > 0.01


@families
def test_right_padded_rows_score_the_same_as_left_padded_ones(family: str) -> None:
    model, encoder = loaded(family)
    row, reply = encoder.prompts([prompts()[0]]), encoder.responses([TEXTS[2]])
    width = reply.ids.shape[1]
    longer = Responses(
        ids=nn.functional.pad(reply.ids, (0, 4), value=encoder.pad_id), mask=nn.functional.pad(reply.mask, (0, 4))
    )
    close(response_hidden(model, row, longer)[:, :width], response_hidden(model, row, reply))


def test_mistake_9_lost_token_types_are_an_error_not_one_dimensional_positions() -> None:
    model, encoder = loaded("qwen2_5_vl")
    inputs = replace(encoder.prompts(prompts()), token_extras={})
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        hidden_states(model, inputs)


def test_m_rope_positions_are_the_models_own() -> None:
    model, encoder = loaded("qwen2_5_vl")
    row = encoder.prompts([prompts()[2]])
    kwargs = join(row)
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    hidden_states(model, row)
    hook.remove()
    grid, types = kwargs["image_grid_thw"], kwargs["mm_token_type_ids"]
    expected, _ = model.model.get_rope_index(
        row.input_ids, types, image_grid_thw=grid, attention_mask=row.attention_mask
    )
    positions = seen["position_ids"]
    assert torch.equal(positions[-3:], expected)
    assert not torch.equal(expected[1], expected[2]), "two-dimensional positions"


@families
def test_log_probabilities_come_from_the_states_that_predict_each_token(family: str) -> None:
    model, encoder = loaded(family)
    inputs, responses = encoder.prompts(prompts()), encoder.responses(TEXTS)
    logps = token_logps(response_hidden(model, inputs, responses), output_head(model), responses.ids, chunk_size=7)
    for i, (prompt, text) in enumerate(zip(prompts(), TEXTS, strict=True)):
        row, reply = encoder.prompts([prompt]), encoder.responses([text])
        start = row.input_ids.shape[1]
        distribution = model(**join(row, reply)).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = distribution.gather(1, reply.ids[0][:, None])[:, 0]
        close(logps[i][responses.mask[i]], expected)


@pytest.mark.capability("features once")
@every_family
def test_cached_features_equal_a_fresh_encoding(family: str, cell: Any) -> None:
    model, encoder = known(family)
    inputs, responses = encoder.prompts(prompts()).repeat(2), encoder.responses([t for t in TEXTS for _ in range(2)])
    featured = encode_images(model, inputs)
    if family == "mllama":  # its forward takes none
        assert featured.features is None
        return cell("afresh")
    assert not any(k.startswith("pixel") for k in join(featured))
    close(hidden_states(model, featured, responses), hidden_states(model, inputs, responses))
    rows = [5, 0, 3]
    close(
        hidden_states(model, featured.select(rows), responses.select(rows)),
        hidden_states(model, inputs.select(rows), responses.select(rows)),
    )
    text_only = encode_images(model, inputs.select([2, 3]))
    close(hidden_states(model, text_only), hidden_states(model, inputs.select([2, 3])))


def counted(model: Any, inputs: Inputs, **options: Any) -> tuple[Inputs, int]:
    """Encoded inputs, and how many pictures (or patches) went through the tower."""
    calls: list[int] = []
    tower = model.get_encoder(modality="image")
    hook = tower.register_forward_pre_hook(
        lambda m, a, k: calls.append(len(k.get("pixel_values", a[0] if a else None))), with_kwargs=True
    )
    inputs = encode_images(model, inputs, **options)
    hook.remove()
    return inputs, sum(calls)


@families
def test_equal_pictures_are_encoded_once(family: str) -> None:
    model, encoder = loaded(family)
    same = [Prompt(text=f"what is {i}?", images=(picture(16, 16, 2),)) for i in range(3)]
    _, one = counted(model, encoder.prompts(same[:1]))
    _, three = counted(model, encoder.prompts(same))
    _, copies = counted(model, encoder.prompts(same).repeat(4))
    assert one == three == copies > 0


@families
def test_the_cache_between_steps_changes_no_bit(family: str) -> None:
    model, encoder = loaded(family)
    cache = VisionCache(2**20)
    inputs = encoder.prompts(prompts())
    encode_images(model, inputs.select([2]), cache)
    warm, calls = counted(model, inputs, cache=cache)
    cold, all_calls = counted(model, inputs, cache=VisionCache(2**20))
    assert 0 < calls < all_calls and 0 < cache.used <= cache.limit
    assert torch.equal(hidden_states(model, warm), hidden_states(model, cold))
    assert counted(model, inputs, cache=cache)[1] == 0
    small = VisionCache(1)
    encode_images(model, inputs, small)
    assert small.used == 0


def test_features_that_do_not_match_the_image_tokens_are_an_error() -> None:
    output = type("Output", (), {"pooler_output": [torch.zeros(4, 2), torch.zeros(4, 2)]})()
    assert [len(row["pooler_output"]) for row in split_features(output, [4, 4])] == [1, 1]
    assert [len(row["pooler_output"]) for row in split_features(output, [8])] == [2]
    for tokens in ([4], [3, 5], [4, 4, 4]):
        with pytest.raises(ValueError, match="do not fall on"):
            split_features(output, tokens)


@families
def test_supervised_backward_reaches_the_language_model_and_not_the_frozen_tower(family: str) -> None:
    model, _ = FAMILIES[family]()
    encoder = loaded(family)[1]
    freeze_vision(model)
    assert vision_is_frozen(model)
    inputs, responses = encoder.prompts(prompts()), encoder.responses(TEXTS)
    hidden = response_hidden(model, inputs, responses)
    token_logps(hidden, output_head(model), responses.ids, chunk_size=64)[responses.mask].mean().backward()
    language = {id(p) for p in (*model.get_decoder().parameters(), *model.get_output_embeddings().parameters())}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in language) or name.endswith("k_proj.bias"), name


def test_the_projector_may_stay_trainable() -> None:
    model, _ = FAMILIES["llava"]()
    freeze_vision(model, projector=False)
    trains = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and n.startswith("model.")}
    assert trains == {"language_model", "multi_modal_projector"} and not vision_is_frozen(model)


@families
def test_adapters_sit_on_the_language_model_only_and_start_as_no_change(family: str) -> None:
    model, _ = FAMILIES[family]()
    encoder = loaded(family)[1]
    before = hidden_states(model, encoder.prompts(prompts()))
    mine = add_lora(model, LoraSettings(r=2))
    assert torch.equal(before, hidden_states(model, encoder.prompts(prompts())))
    prefix = {"llava": "language_model", "idefics3": "text_model", "qwen2_5_vl": "language_model"}[family]
    assert all(name.startswith(f"model.{prefix}.layers.") for name in mine)
    assert len(mine) == 2 * 7 * 2, "two layers of seven linear maps, two matrices each"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == mine.keys()
    few = add_lora(FAMILIES[family]()[0], LoraSettings(r=2, targets="q_proj|v_proj"))
    assert len(few) == 2 * 2 * 2
    with pytest.raises(ValueError, match="none of the language model"):
        add_lora(FAMILIES[family]()[0], LoraSettings(targets="nothing"))


@pytest.mark.capability("plain PEFT")
@every_family
def test_a_saved_adapter_is_plain_peft_and_load_backbone_merges_it(family: str, tmp_path) -> None:
    model, encoder = load_backbone(base(family)), known(family)[1]
    torch.manual_seed(0)
    shake(add_lora(model, LoraSettings(r=2), "policy"), 0.3)
    save_adapter(model, "policy", tmp_path / "adapter")
    inputs = encoder.prompts(prompts())
    real = inputs.attention_mask.bool()
    expected = hidden_states(model, inputs)[real]
    assert (expected - hidden_states(load_backbone(base(family)), inputs)[real]).abs().max() > 0.1
    plain = AutoModelForImageTextToText.from_pretrained(base(family))
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    close(hidden_states(peft.base_model.model, inputs)[real], expected)
    row = encoder.prompts(prompts()[:1])
    close(peft(**join(row)).logits, output_head(model)(hidden_states(model, row)))
    merged = load_backbone(tmp_path / "adapter")
    again = load_backbone(base(family), adapter=tmp_path / "adapter")
    assert not adapter_parameters(again, "default")
    assert torch.equal(hidden_states(again, inputs)[real], hidden_states(merged, inputs)[real])
    torch.testing.assert_close(exact_states(merged, inputs), exact_states(model, inputs), **SAME)


def test_an_adapter_on_an_adapter_loads_through_both(tmp_path) -> None:
    folder, expected = save("llava", tmp_path / "base"), None
    encoder = loaded("llava")[1]
    for name in ("first", "second"):
        model = load_backbone(folder)
        model.name_or_path = str(folder)
        shake(add_lora(model, LoraSettings(r=2), name), 0.3)
        folder = tmp_path / name
        save_adapter(model, name, folder)
        expected = exact_states(model, encoder.prompts(prompts()))
    merged = exact_states(load_backbone(folder), encoder.prompts(prompts()))
    torch.testing.assert_close(merged, expected, **SAME)
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "first"), "absolute: it loads from any working directory"
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="put it back"):
        load_backbone(folder)


def test_loading_says_what_is_wrong(tmp_path) -> None:
    base = save("llava", tmp_path / "base")
    assert load_backbone(base, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not a torch dtype"):
        load_backbone(base, dtype="fp8ish")
    with pytest.raises(ValueError, match="use '4bit'"):
        load_backbone(base, quantization="3bit")  # type: ignore[arg-type]
    model = load_backbone(base)
    add_lora(model, LoraSettings(r=2))
    save_adapter(model, "default", tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge it in full precision first"):
        load_backbone(tmp_path / "adapter", quantization="4bit")


@pytest.mark.parametrize("given", [None, "cuda:1"])
def test_quantized_weights_load_on_the_device_of_the_process(tmp_path, monkeypatch, given) -> None:
    """The fourth process of a machine loads on its fourth device: quantized weights are not moved later."""
    asked: dict[str, Any] = {}

    def from_pretrained(path, **options):
        asked.update(options)
        config = SimpleNamespace(model_type="llava")
        return SimpleNamespace(config=config, can_generate=lambda: False, eval=lambda: None, modules=list)

    monkeypatch.setattr(backbone.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(backbone, "_quantization", lambda kind, dtype: kind)
    monkeypatch.setattr(backbone, "process_state", lambda: SimpleNamespace(device=torch.device("cuda", 3)))
    (tmp_path / "config.json").touch()
    load_backbone(tmp_path, quantization="4bit", device=given)
    assert asked["device_map"] == {"": torch.device("cuda", 3) if given is None else given}


def test_quantization_without_bitsandbytes_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load_backbone(tmp_path, quantization="4bit")


def test_the_head_is_found_by_what_the_model_itself_does() -> None:
    """logits = cap * tanh(scale * W h / cap), as in Gemma and Granite, is recognised; an unknown way is an error."""
    model, _ = FAMILIES["llava"]()
    plain = type(model).forward
    assert isinstance(output_head(model), nn.Linear)

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = 5.0 * torch.tanh(output.logits / 4.0 / 5.0)
        return output

    other, _ = FAMILIES["llava"]()
    other.forward = scaled.__get__(other)
    with pytest.raises(NotImplementedError, match="quirks"):
        output_head(other)
    other.config.text_config.logits_scaling, other.config.text_config.final_logit_softcapping = 4.0, 5.0
    head = output_head(other)
    assert isinstance(head, ScaledHead)
    ids = torch.tensor([[5, 6, 7]])
    close(head(other.base_model(input_ids=ids).last_hidden_state), other(input_ids=ids).logits)


def test_bases_are_told_apart_and_adapters_do_not_matter() -> None:
    model, other = FAMILIES["llava"](0)[0], FAMILIES["llava"](1)[0]
    before = fingerprint(model)
    assert before != fingerprint(other)
    add_lora(model, LoraSettings(r=2))
    assert fingerprint(model) == before
    assert fingerprint(FAMILIES["llava"](0)[0].bfloat16()) == before
