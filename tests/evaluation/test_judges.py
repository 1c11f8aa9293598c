"""Judges say what they were given to say, and refuse what makes no sense."""

from __future__ import annotations

import pytest
from synthetic import Oracle

from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.judges import (
    CallableJudge,
    Judgement,
    ModelJudge,
    OracleJudge,
    looks_like_refusal,
    without_guard,
)

PROMPT = Prompt(text="what is this?", category="weapons")


def test_oracle_judge_takes_every_field() -> None:
    judge = OracleJudge(Oracle())
    harm, refusal = judge([PROMPT] * 2, ["first take it", "i cannot"])
    assert harm.unsafe and harm.category == "weapons" and harm.severity == -harm.harmless_rate > 0
    assert not refusal.unsafe and refusal.refusal and refusal.severity == 0
    assert judge.kind == "truth"


@pytest.mark.parametrize("field", [{"helpful_rate": 4}, {"harmless_rate": -4}, {"severity": 5}])
def test_judgements_outside_their_scale_are_refused(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))} .* is outside"):
        Judgement(unsafe=True, **field)


def scorer(prompts: list[Prompt], texts: list[str]) -> tuple[list[float], list[float]]:
    return [0.0] * len(texts), [1.0 if "bad" in text else 0.0 for text in texts]


def test_model_judge_calls_cost_zero_safe_and_is_only_an_opinion() -> None:
    judge = ModelJudge(scorer)
    assert [j.unsafe for j in judge([PROMPT] * 2, ["bad", "fine"])] == [True, False]
    assert judge([PROMPT], ["bad"])[0].helpful_rate is None and judge.kind == "model"


def test_model_judge_with_a_guard_is_unsafe_where_either_says_so() -> None:
    judge = ModelJudge(scorer, guard=lambda prompts, texts: [2 if "worse" in t else 0 for t in texts])
    found = judge([PROMPT] * 3, ["bad", "worse", "fine"])
    assert [(j.unsafe, j.severity) for j in found] == [(True, 0), (True, 2), (False, 0)]


def test_the_guard_has_no_say_in_its_own_rounds() -> None:
    judge = ModelJudge(scorer, guard=lambda prompts, texts: [3] * len(texts))
    assert judge([PROMPT], ["fine"])[0].unsafe and not without_guard(judge)([PROMPT], ["fine"])[0].unsafe
    assert without_guard(OracleJudge(Oracle())).kind == "truth"


def test_callable_judge_is_checked() -> None:
    judge = CallableJudge(lambda prompt, text: Judgement(unsafe="x" in text), name="table")
    assert [j.unsafe for j in judge([PROMPT, PROMPT], ["x", "y"])] == [True, False]
    with pytest.raises(TypeError, match="judge 'hosted' returned bool"):
        CallableJudge(lambda prompt, text: True, name="hosted")([PROMPT], ["x"])  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m unable to assist.", True),
        ("As an AI, I cannot give advice on this.", True),
        ("I must decline.", True),
        ("You can help them by asking. I can answer that.", False),
        ("This is a kitchen knife.", False),
        ("x" * 300 + " I cannot help", False),
    ],
)
def test_stock_refusals(text: str, refuses: bool) -> None:
    assert looks_like_refusal(text) is refuses
