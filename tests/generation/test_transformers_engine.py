"""Sampling and log-probabilities speak of the same distribution, on the same prompt tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from more_families import ALL, known
from tiny_models import FAMILIES, loaded, prompts, response_hidden

from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.generation.transformers_engine import through_eos
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import encode_images, output_head
from safe_rlhf_v.vlm.collation import alike, join
from safe_rlhf_v.vlm.processing import Encoder

families = pytest.mark.parametrize("family", FAMILIES)


def engine(family: str) -> tuple[Any, Encoder, TransformersEngine]:
    model, encoder = loaded(family)
    return model, encoder, TransformersEngine(model, encoder)


def watched(which: TransformersEngine, inputs: Inputs, sampling: Sampling) -> Any:
    """What model.generate itself returns under the engine's settings: sequences, raw logits, processed scores."""
    config = which._config(sampling)
    config.return_dict_in_generate = config.output_logits = config.output_scores = True
    with which._undisturbed():
        return which.model.generate(**join(inputs), generation_config=config)


@pytest.mark.capability("generation = forward")
@pytest.mark.parametrize("family", ALL)
def test_logits_while_generating_equal_a_fresh_forward(family: str) -> None:
    """Mistake 9: other prompt tokens, positions or pictures than in training would show here, step by step."""
    model, encoder = known(family)
    which, inputs = TransformersEngine(model, encoder), encoder.prompts(prompts()).repeat(2)
    for given in (inputs, encode_images(model, inputs)):
        for rows in map(given.select, alike(given)):
            output = watched(which, rows, Sampling(max_new_tokens=6))
            width = rows.input_ids.shape[1]
            assert torch.equal(output.sequences[:, :width], rows.input_ids)
            ids = output.sequences[:, width:]
            responses = Responses(ids=ids, mask=through_eos(ids, which.eos_ids))
            fresh = output_head(model)(response_hidden(model, rows, responses))
            drawn = torch.stack(output.logits, dim=1)
            torch.testing.assert_close(drawn[responses.mask], fresh[responses.mask].float(), rtol=2e-5, atol=2e-5)
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    together = which.generate(inputs, 1, greedy)
    for i in range(4):  # rows stand in the order of the prompts, whatever was generated together
        alone = which.generate(encoder.prompts(prompts()[i : i + 1]), 1, greedy)
        assert torch.equal(together.ids[2 * i][together.mask[2 * i]], alone.ids[0][alone.mask[0]])


@families
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_sampling_used(family: str, temperature: float) -> None:
    model, encoder, which = engine(family)
    inputs = encoder.prompts(prompts())
    output = watched(which, inputs, Sampling(max_new_tokens=6, temperature=temperature))
    ids = output.sequences[:, inputs.input_ids.shape[1] :]
    responses = Responses(ids=ids, mask=through_eos(ids, which.eos_ids))
    scores = torch.stack(output.scores, dim=1).log_softmax(-1)
    used = scores.gather(-1, ids[..., None])[..., 0]
    hidden, suppress = response_hidden(model, inputs, responses), encoder.placeholder_ids
    logps = token_logps(hidden, output_head(model), ids, suppress=suppress, temperature=temperature)
    torch.testing.assert_close(logps[responses.mask], used[responses.mask], rtol=1e-5, atol=1e-5)


@families
def test_mistake_8_a_placeholder_is_never_sampled(family: str) -> None:
    """Even when its logit is by far the largest; and the log-probabilities leave it out of the softmax alike."""
    model, processor = FAMILIES[family]()
    encoder = Encoder(processor, config=model.config)
    wanted = list(encoder.placeholder_ids)

    def push(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(-1, torch.tensor(wanted), torch.full((*logits.shape[:-1], len(wanted)), 50.0))

    model.get_output_embeddings().register_forward_hook(push)
    which, inputs = TransformersEngine(model, encoder), encoder.prompts(prompts())
    for temperature in (0.0, 1.0):
        responses = which.generate(inputs, 3, Sampling(max_new_tokens=6, temperature=temperature))
        assert not torch.isin(responses.ids, torch.tensor(wanted)).any()
    hidden, rows = response_hidden(model, inputs.repeat(3), responses), responses.ids
    kept = token_logps(hidden, output_head(model), rows, suppress=encoder.placeholder_ids)
    lost = token_logps(hidden, output_head(model), rows)
    assert kept[responses.mask].min() > -30 > lost[responses.mask].max(), "unsuppressed they would all be impossible"


def test_mistake_3_the_mask_runs_through_the_first_eos() -> None:
    ids = torch.tensor([[5, 9, 0, 0], [9, 0, 0, 0], [5, 6, 7, 8], [5, 8, 9, 9]])
    true, false = True, False
    expected = [[true, true, false, false], [true, false, false, false], [true] * 4, [true, true, true, false]]
    assert through_eos(ids, [9]).tolist() == expected
    assert through_eos(ids, [9, 8])[3].tolist() == [true, true, false, false], "any of several ends it"


def test_mistake_3_generated_pads_are_not_tokens() -> None:
    """EOS made likely: rows end at different times; what follows is padding and outside the mask."""
    model, processor = FAMILIES["llava"]()
    encoder = Encoder(processor)
    model.get_output_embeddings().register_forward_hook(
        lambda m, a, logits: logits.index_add(
            -1, torch.tensor([encoder.eos_id]), torch.full((*logits.shape[:-1], 1), 3.0)
        )
    )
    torch.manual_seed(0)
    which = TransformersEngine(model, encoder)
    responses = which.generate(encoder.prompts(prompts()), 8, Sampling(max_new_tokens=8))
    lengths = responses.mask.sum(1)
    assert lengths.min() >= 1 and len(set(lengths.tolist())) > 2
    for ids, mask, length in zip(responses.ids, responses.mask, lengths.tolist(), strict=True):
        assert mask.tolist() == [i < length for i in range(len(ids))]
        assert (ids[length:] == encoder.pad_id).all()
        assert encoder.eos_id not in ids[: length - 1].tolist()
        assert ids[length - 1] == encoder.eos_id or length == 8, "it ended, or was cut off with a mask all True"


def test_every_end_the_checkpoint_knows_ends_a_response() -> None:
    model, encoder = loaded("llava")
    model = copy.copy(model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [encoder.eos_id, 7]
    assert TransformersEngine(model, encoder).eos_ids == sorted({encoder.eos_id, 7})
    model.generation_config.eos_token_id = None
    assert TransformersEngine(model, encoder).eos_ids == [encoder.eos_id]


@families
def test_rows_of_a_prompt_stand_together(family: str) -> None:
    _, encoder, which = engine(family)
    greedy = Sampling(max_new_tokens=5, temperature=0.0)
    together = which.generate(encoder.prompts(prompts()), 3, greedy)
    assert len(together) == 12
    for i, prompt in enumerate(prompts()):
        alone = which.generate(encoder.prompts([prompt]), 1, greedy)
        width = alone.ids.shape[1]
        for row in range(3 * i, 3 * i + 3):
            assert torch.equal(together.ids[row, :width], alone.ids[0])


@families
@pytest.mark.parametrize("featured", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_is_read_once_for_all_its_samples(family: str, featured: bool, cache: Any) -> None:
    """The same draws as from repeated prompts, while the model reads N prompts and then one token a row."""
    model, encoder, plain = engine(family)
    which, inputs = TransformersEngine(model, encoder, cache), encoder.prompts(prompts())
    inputs = encode_images(model, inputs) if featured else inputs
    seen: list[tuple[int, ...]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    sampling = Sampling(max_new_tokens=6)
    torch.manual_seed(1)
    once = which.generate(inputs, 3, sampling)
    hook.remove()
    torch.manual_seed(1)
    repeated = plain.generate(inputs.repeat(3), 1, sampling)
    assert seen[0] == (4, inputs.input_ids.shape[1] - 1) and set(seen[1:]) == {(12, 1)}
    assert torch.equal(once.ids, repeated.ids) and torch.equal(once.mask, repeated.mask)


@families
def test_a_static_cache_changes_nothing(family: str) -> None:
    model, encoder, dynamic = engine(family)
    inputs, sampling, drawn = encoder.prompts(prompts()), Sampling(max_new_tokens=6), []
    for which in (dynamic, TransformersEngine(model, encoder, "static")):
        torch.manual_seed(2)
        drawn.append(which.generate(inputs, 1, sampling))
    assert torch.equal(drawn[0].ids, drawn[1].ids)


def test_the_global_generator_alone_decides() -> None:
    _, encoder, which = engine("llava")
    inputs, sampling = encoder.prompts(prompts()), Sampling(max_new_tokens=5)
    torch.manual_seed(1)
    which.generate(inputs, 2, sampling)
    state = torch.get_rng_state()
    first, second = which.generate(inputs, 2, sampling), which.generate(inputs, 2, sampling)
    assert not torch.equal(first.ids, second.ids)
    torch.set_rng_state(state)
    assert torch.equal(which.generate(inputs, 2, sampling).ids, first.ids)
    torch.set_rng_state(state)
    which.generate(inputs, 2, Sampling(max_new_tokens=5, temperature=0.0))
    assert torch.equal(torch.get_rng_state(), state), "greedy decoding draws nothing"


def test_the_checkpoints_own_generation_settings_do_not_leak_in() -> None:
    """transformers fills unset options from the model (Qwen2.5-VL ships a repetition penalty): the policy would not be
    the distribution whose log-probabilities are trained."""
    model, processor = FAMILIES["llava"]()
    encoder = Encoder(processor)
    which, inputs = TransformersEngine(model, encoder), encoder.prompts(prompts())
    expected = torch.stack(watched(which, inputs, Sampling(max_new_tokens=3, temperature=0.0)).scores)
    for name, value in {"repetition_penalty": 3.0, "top_k": 1, "no_repeat_ngram_size": 1, "min_p": 0.9}.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    actual = torch.stack(watched(which, inputs, Sampling(max_new_tokens=3, temperature=0.0)).scores)
    assert torch.equal(actual, expected)
    drawn = torch.stack(watched(which, inputs, Sampling(max_new_tokens=1)).scores)
    assert (drawn > -torch.inf).sum(-1).eq(drawn.shape[-1] - 1).all(), "all but the one placeholder may be drawn"
    assert model.generation_config is settings


def test_the_models_mode_is_left_as_it_was() -> None:
    model, processor = FAMILIES["llava"]()
    which = TransformersEngine(model, Encoder(processor))
    for mode in (True, False):
        model.train(mode)
        which.generate(which.encoder.prompts(prompts()[:1]), 1, Sampling(max_new_tokens=1))
        assert model.training is mode


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Sampling(**wrong)
