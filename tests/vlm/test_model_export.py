"""What is exported needs nothing of this package: plain transformers loads it, and it gives the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from more_families import ALL, base, known
from tiny_models import SAME, exact_states, loaded, prompts, shake
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from safe_rlhf_v.cli import app
from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.vlm.adapters import LoraSettings, add_lora, save_adapter
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.export import export_model
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from safe_rlhf_v.vlm.source import ModelError

LORA = LoraSettings(r=2)


def policy(family: str, folder: Path) -> TransformersEngine:
    """An adapter that moved far from its base, saved as the policy stage saves it, and its unmerged model."""
    model, processor = load_backbone(base(family)), known(family)[1].processor
    torch.manual_seed(0)
    shake(add_lora(model, LORA, "policy"), 0.3)
    save_adapter(model, "policy", folder)
    processor.save_pretrained(folder)
    return TransformersEngine(model, Encoder(processor, config=model.config))


@pytest.mark.capability("export")
@pytest.mark.parametrize("family", ALL)
def test_an_exported_policy_answers_as_the_adapter_does(family: str, tmp_path: Path) -> None:
    adapter = policy(family, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    merged = TransformersEngine(model, Encoder(load_processor(tmp_path / "merged"), config=model.config))
    inputs, greedy = merged.encoder.prompts(prompts()), Sampling(max_new_tokens=6, temperature=0.0)
    torch.testing.assert_close(*[exact_states(m, inputs) for m in (model, adapter.model)], **SAME)
    ours, theirs = (e.decode(w.generate(inputs, 1, greedy)) for w in (adapter, merged) for e in (w.encoder,))
    assert ours == theirs
    before = TransformersEngine(load_backbone(base(family)), adapter.encoder)
    assert ours != before.encoder.decode(before.generate(inputs, 1, greedy)), "the adapter matters"


@pytest.mark.parametrize("family", ["llava", "idefics3"])  # whose processor needs no torchvision
def test_plain_transformers_does_all_of_it(family: str, tmp_path: Path) -> None:
    adapter = policy(family, tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").double()  # no tie by rounding
    adapter.model.double()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    prompt = prompts()[0]
    content = [{"type": "image", "image": prompt.images[0].load()}, {"type": "text", "text": prompt.text}]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    stops = list(adapter.encoder.placeholder_ids)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=stops)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    greedy = Sampling(max_new_tokens=6, temperature=0.0)
    assert text == adapter.encoder.decode(adapter.generate(adapter.encoder.prompts([prompt]), 1, greedy))


def test_a_reward_model_keeps_its_head_and_its_scores(tmp_path: Path) -> None:
    model = HeadedModel(load_backbone(base("llava")), {"score": 1}, LORA, bias=True).eval()
    shake({n: p for n, p in model.named_parameters() if "lora_B" in n}, 0.1)
    model.save_pretrained(tmp_path / "reward")
    export_model(tmp_path / "reward", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    encoder = loaded("llava")[1]
    inputs, responses = encoder.prompts(prompts()), encoder.responses(["a", "b", "I cannot", ""])
    again, expected = HeadedModel.from_pretrained(tmp_path / "merged"), model(inputs, responses)["score"]
    torch.testing.assert_close(again(inputs, responses)["score"], expected, rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_once_after_merging(tmp_path: Path) -> None:
    """Merging in bfloat16 would round the base, the change and their sum."""
    policy("llava", tmp_path / "policy")
    export_model(tmp_path / "policy", tmp_path / "merged", "bfloat16")
    exact = dict(load_backbone(tmp_path / "policy").named_parameters())
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto")
    assert saved.dtype == torch.bfloat16
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, exact[name].bfloat16()), name


def test_the_command_writes_a_whole_folder_or_says_why_not(tmp_path: Path) -> None:
    policy("llava", tmp_path / "policy")
    run = lambda *words: CliRunner().invoke(app, ["export", *map(str, words)])  # noqa: E731
    done = run(tmp_path / "policy", tmp_path / "merged", "--dtype", "float16")
    assert done.exit_code == 0 and load_backbone(tmp_path / "merged", dtype="float16").dtype == torch.float16
    for words, message in (
        ((tmp_path / "policy", tmp_path / "merged"), "name a new folder"),
        ((tmp_path / "policy", tmp_path / "more", "--dtype", "int8"), "use float32"),
        ((tmp_path / "nothing", tmp_path / "more"), "no such folder"),
    ):
        failed = run(*words)
        assert failed.exit_code == 2 and message in failed.output.replace("\n", " "), failed.output
        assert not (tmp_path / "more").exists()
    (tmp_path / "policy" / "guard.json").touch()
    with pytest.raises(ModelError, match="used as it is"):
        export_model(tmp_path / "policy", tmp_path / "more")
