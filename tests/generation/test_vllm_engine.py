"""The vLLM engine against a stand-in for vLLM: what is sent, what comes back, what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import vllm_stub
from tiny_models import FAMILIES, prompts, save

from beavertails_v.schema import Prompt
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.generation.vllm_engine import VLLMEngine, colocated
from safe_rlhf_v.generation.vllm_server import VLLMServer
from safe_rlhf_v.roles.protocol import AdapterRoles
from safe_rlhf_v.stages import build
from safe_rlhf_v.vlm.backbone import LoraSettings
from safe_rlhf_v.vlm.source import ModelError

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
LIMITS: dict[str, Any] = dict(rank=2, dtype="float32", seed=0, gpu_memory_utilization=0.3, max_model_len=None)


@cache
def base(family: str = "llava") -> Path:
    return save(family, Path(mkdtemp()) / family)


def roles(family: str = "llava") -> AdapterRoles:
    found = AdapterRoles.from_pretrained(base(family), critics=False, lora=LoraSettings(r=2))
    vllm_stub.shake(found.policy_parameters(), 1)
    return found


def here(found: AdapterRoles, tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[VLLMEngine, vllm_stub.LLM]:
    vllm_stub.install(patch)
    client = colocated(found.backbone.name_or_path, **LIMITS)
    eos_ids = TransformersEngine(found.backbone, found.encoder).eos_ids
    return VLLMEngine(client, found.encoder, found.save_policy_adapter, tmp_path / "vllm", eos_ids), client.model


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_policy_as_it_is_now(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers equal those on the training weights, before and after an update of the adapter."""
    found = roles(family)
    engine, model = here(found, tmp_path, monkeypatch)
    inputs, drawn = found.encoder.prompts(prompts()), []
    for seed in (1, 2):
        vllm_stub.shake(found.policy_parameters(), seed)
        expected = found.generate(inputs, 2, GREEDY)
        drawn.append(engine.generate(inputs, 2, GREEDY, prompts()))
        assert torch.equal(drawn[-1].ids, expected.ids) and torch.equal(drawn[-1].mask, expected.mask)
    assert drawn[0].ids.shape != drawn[1].ids.shape or not torch.equal(drawn[0].ids, drawn[1].ids)
    assert model.options["enable_lora"] and model.options["max_lora_rank"] == 2
    sent = [request for _, request in model.asked]
    assert [r.lora_int_id for r in sent] == [1, 2] and sent[0].lora_name != sent[1].lora_name
    assert {p.name for p in Path(sent[1].lora_path).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not Path(sent[0].lora_path).exists(), "only the newest adapter is kept"


def engine_of(chosen: list[str], *more: Any) -> Any:
    settings = load_settings(None, chosen)
    return build.engine(settings.policy.engine, build.setup(settings), *more)


def test_the_settings_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stub.install(monkeypatch)
    found = roles()
    chosen = ["policy.engine.kind=vllm", "policy.engine.max_model_len=99", "model.lora.r=2"]
    engine = engine_of(chosen, str(base()), found, tmp_path)
    assert isinstance(engine, VLLMEngine) and engine.client.model.options["max_model_len"] == 99
    inputs = found.encoder.prompts(prompts())
    assert torch.equal(engine.generate(inputs, 1, GREEDY, prompts()).ids, found.generate(inputs, 1, GREEDY).ids)
    server = engine_of([*chosen, "policy.engine.url=http://x:1/v1"], "", found, tmp_path)
    assert server.client.url == "http://x:1"
    assert engine_of([], "", found, tmp_path) is None


def test_sampling_goes_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = roles()
    engine, model = here(found, tmp_path, monkeypatch)
    inputs, sampling = found.encoder.prompts(prompts()), Sampling(max_new_tokens=3, temperature=0.7)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        responses = engine.generate(inputs, 3, sampling, prompts())
    assert len(responses) == 12
    settings = [s for s, _ in model.asked]
    seeds = [[x.seed for x in s] for s in settings]
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 4, "torch's generator decides, prompt by prompt"
    first = settings[0][0]
    assert (first.n, first.temperature, first.top_p, first.top_k, first.max_tokens) == (3, 0.7, 1.0, -1, 3)
    assert set(first.logit_bias) == set(found.encoder.placeholder_ids) and set(first.logit_bias.values()) == {-100.0}


def test_other_prompt_ids_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: image tokens expanded twice, pictures resized otherwise, another template. All show in the ids."""
    found = roles()
    engine, model = here(found, tmp_path, monkeypatch)
    model.extra = [7]
    inputs = found.encoder.prompts(prompts())
    length = int(inputs.attention_mask[0].sum())
    with pytest.raises(ModelError, match=rf"{prompts()[0].id}: vLLM read {length + 1} tokens where {length} are .* 0"):
        engine.generate(inputs, 1, GREEDY, prompts())


def test_a_bos_that_the_tokenizer_adds_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = here(roles(), tmp_path, monkeypatch)
    prompt = Prompt(text="what is it?")

    class Adding:
        bos_token, bos_token_id = "<|im_start|>", 9

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [self.bos_token_id, 1]}

    assert engine._text(prompt).startswith("<|im_start|>user")
    engine.encoder.tokenizer = Adding()
    assert engine._text(prompt).startswith("user")


def test_prompts_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = roles()
    engine, _ = here(found, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="encodes prompts by itself: 0 were given for 4 inputs"):
        engine.generate(found.encoder.prompts(prompts()), 1, GREEDY)


def test_without_vllm_and_on_an_adapter_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="pip install vllm"):
        colocated(base(), **LIMITS)
    vllm_stub.install(monkeypatch)
    roles().save_policy_adapter(tmp_path)
    with pytest.raises(ModelError, match="merge it into its base model first"):
        colocated(tmp_path, **LIMITS)


def test_a_server_gives_the_same_answers(tmp_path: Path) -> None:
    found = roles()
    inputs = found.encoder.prompts(prompts())
    with vllm_stub.server(base()) as (url, seen):
        engine = VLLMEngine(VLLMServer(url + "/"), found.encoder, found.save_policy_adapter, tmp_path / "vllm")
        for _ in range(2):
            assert torch.equal(engine.generate(inputs, 2, GREEDY, prompts()).ids, found.generate(inputs, 2, GREEDY).ids)
    names = [(path.rpartition("/")[2], body.get("lora_name")) for path, body in seen if "lora" in path]
    loaded, unloaded = "load_lora_adapter", "unload_lora_adapter"
    assert names == [(loaded, "vllm-1"), (loaded, "vllm-2"), (unloaded, "vllm-1")]
    chats = [body for path, body in seen if path.endswith("completions")]
    assert len(chats) == 8 and {body["model"] for body in chats} == {"vllm-1", "vllm-2"}
    pictures = [sum(part["type"] == "image_url" for part in body["messages"][0]["content"]) for body in chats]
    assert sorted(pictures) == [0, 0, 1, 1, 1, 1, 2, 2]


def test_what_a_server_may_get_wrong(tmp_path: Path) -> None:
    found = roles()
    inputs = found.encoder.prompts(prompts())

    def engine(url: str) -> VLLMEngine:
        return VLLMEngine(VLLMServer(url), found.encoder, found.save_policy_adapter, tmp_path / "vllm")

    with vllm_stub.server(base(), token_ids=False) as (url, _):
        with pytest.raises(ModelError, match="sends no token ids back"):
            engine(url).generate(inputs, 1, GREEDY, prompts())
        client = VLLMServer(url)
        with pytest.raises(ModelError, match="answers 404: The model `None` does not exist"):
            client.complete(engine(url)._requests(prompts()), engine(url)._options(GREEDY, 1))
    with pytest.raises(ModelError, match="no vLLM server answers"):
        engine(url).generate(inputs, 1, GREEDY, prompts())
