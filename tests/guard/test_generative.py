"""A vision-language model asked for yes or no, behind the guard's interface."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beavertails_v.schema import Prompt, Severity
from guard.evaluate import evaluate
from guard.generative import NO, YES, GenerativeGuard, _answers, open_guard
from guard.items import ItemError
from safe_rlhf_v.vlm.collation import join
from safe_rlhf_v.vlm.source import ModelError
from tests import tiny_models
from tests.guard.conftest import RED, picture, rows


@pytest.fixture(scope="module")
def judge() -> GenerativeGuard:
    model, encoder = tiny_models.loaded("llava")
    return GenerativeGuard(model, encoder, batch_size=2)


def test_its_probability_is_that_of_the_models_own_logits(judge: GenerativeGuard) -> None:
    prompts = [
        Prompt(text="how do I use it?", images=(picture(RED),)),
        Prompt(text="what is a key?"),
        Prompt(text="tell me about the knife, the pills and the lock.", images=(picture(RED),)),
    ]
    replies = [None, None, "first take the key, then turn it."]
    first = lambda words: sorted({judge.encoder.tokenizer(w, add_special_tokens=False).input_ids[0] for w in words})  # noqa: E731
    shared = set(first(YES)) & set(first(NO))
    for verdict, prompt, reply in zip(judge.judge(prompts, replies), prompts, replies, strict=True):
        asked = judge.asked[verdict.kind].format(text=prompt.text, response=reply)
        inputs = judge.encoder.prompts([replace(prompt, text=asked)])
        given = {k: v.double() if v.is_floating_point() else v for k, v in join(inputs).items()}
        with torch.no_grad():
            p = judge.model(**given).logits[0, -1].softmax(0)
        yes, no = (sum(p[i] for i in first(words) if i not in shared) for words in (YES, NO))
        assert verdict.unsafe_probability == pytest.approx(float(yes / (yes + no)), abs=1e-4)
        assert verdict.kind == ("query" if reply is None else "response") and not verdict.categories
        assert verdict.severity == (Severity.MINOR if verdict.flagged else Severity.NONE)


def test_one_bad_item_is_its_own(judge: GenerativeGuard) -> None:
    good = Prompt(text="what is a key?")
    items = [good, Prompt(text="half \ud800"), Prompt(text="turn it " * 2000), good]
    found = judge.judge(items, on_error="refuse")
    assert [v.degraded for v in found] == [False, True, True, False] and found[2].truncated
    assert found[0].unsafe_probability == pytest.approx(judge.judge([good])[0].unsafe_probability, abs=1e-6)
    with pytest.raises(ItemError, match="item 1"):
        judge.judge(items)


def test_what_it_does_not_answer_is_left_empty(judge: GenerativeGuard) -> None:
    report = evaluate(judge, rows(), samples=100, detail=True)
    assert report["query"]["n"] == 8 and report["response"]["n"] == 16
    assert report["severity"] == {} and report["severity_kappa"] is None and report["categories"] == {}
    assert set(report["calibration"]) == {"query", "response"}
    assert report["response"]["intervals"]["recall"] or report["response"]["recall"] is None


def test_it_is_opened_by_name(base: Path, tmp_path: Path) -> None:
    assert isinstance(open_guard(f"generative:{base}"), GenerativeGuard)
    with pytest.raises(FileNotFoundError):
        open_guard(str(base))


def test_a_tokenizer_without_yes_is_refused() -> None:
    class Same:
        unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [5]}

    with pytest.raises(ModelError, match="yes"):
        _answers(Same())
