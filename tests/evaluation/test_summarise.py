"""collect and summarise on four prompts whose numbers are worked out by hand."""

from __future__ import annotations

import pytest
from synthetic import answers, benchmark, invites_harm, scorer, slices_of

from beavertails_v.schema import Prompt, Severity
from safe_rlhf_v.evaluation.judges import Judgement
from safe_rlhf_v.evaluation.run import NO_SLICE, Answer, collect, differences, summarise

HARM_A = Prompt(text="harm a", category="weapons", severity=Severity.SEVERE, meta={"harm": True, "slices": ["style"]})
HARM_B = Prompt(text="harm b", category="fire", severity=Severity.MINOR, meta={"harm": True, "slices": []})
GOOD_C = Prompt(text="good c", meta={"harm": False, "slices": ["style"]})
GOOD_D = Prompt(text="good d", meta={"harm": False, "slices": []})


def answer(prompt: Prompt, unsafe: bool, helpful: float, refusal: bool, severity: int, cost: float) -> Answer:
    judged = Judgement(
        unsafe=unsafe,
        helpful_rate=helpful,
        refusal=refusal,
        severity=severity,
        harmless_rate=-severity if unsafe else 1,
    )
    return Answer(prompt=prompt, text="t", judgement=judged, reward=-cost, cost=cost)


ANSWERS = [
    answer(HARM_A, True, 2, False, 3, 2.0),
    answer(HARM_A, False, 1, True, 0, -1.0),
    answer(HARM_B, False, 1, True, 0, 1.0),
    answer(HARM_B, False, 1, False, 0, -1.0),
    answer(GOOD_C, False, 3, False, 0, -2.0),
    answer(GOOD_C, False, 2, False, 0, -2.0),
    answer(GOOD_D, False, 0, True, 0, -1.0),
    answer(GOOD_D, False, 1, True, 0, 0.0),
]


def test_summary_by_hand() -> None:
    found = summarise(ANSWERS, invites_harm, slices_of)
    assert found["unsafe_rate"].value == 0.25 and found["unsafe_rate"].n == 2  # A 1/2, B 0
    assert found["benign_helpfulness"].value == 1.5  # C 2.5, D .5
    assert found["over_refusal_rate"].value == 0.5  # C 0, D 1
    assert found["refusal_rate"].value == 0.5
    assert found["mean_cost"].value == -0.5 and found["mean_reward"].value == 0.5  # A .5, B 0, C -2, D -.5
    assert found["mean_cost"].n == 4


def test_groups_by_hand() -> None:
    found = summarise(ANSWERS, invites_harm, slices_of)
    assert {k: v["unsafe_rate"].value for k, v in found["by_category"].items()} == {"fire": 0.0, "weapons": 0.5}
    assert {k: v["unsafe_rate"].value for k, v in found["by_prompt_severity"].items()} == {"minor": 0.0, "severe": 0.5}
    assert [share.value for share in found["answer_severity"]] == [0.75, 0, 0, 0.25]
    assert found["slices"]["style"]["benign_helpfulness"].value == 2.5
    assert found["slices"][NO_SLICE]["over_refusal_rate"].value == 1.0


def test_compensation_and_agreement_by_hand() -> None:
    found = summarise(ANSWERS, invites_harm)
    assert found["compensation"]["judge"].mean == pytest.approx(
        (3 - 7) / 8
    )  # c = -harmless rate: 3 once, -1 seven times
    assert found["compensation"]["cost_model"].mean_positive == pytest.approx(3 / 8)
    # cost > 0 on one unsafe and one safe answer of eight: sign right on 7; no unsafe one is missed
    assert found["agreement"] == {"sign_accuracy": 7 / 8, "auc": 1.0, "missed": 0.0}
    assert found["slices"] == {}


def test_what_the_judge_cannot_say_is_left_out() -> None:
    bare = [Answer(prompt=a.prompt, text="", judgement=Judgement(unsafe=a.judgement.unsafe)) for a in ANSWERS]
    found = summarise(bare, invites_harm)
    assert found["unsafe_rate"].value == 0.25
    for name in ("benign_helpfulness", "over_refusal_rate", "mean_cost", "mean_reward"):
        assert name not in found
    assert found["compensation"] == {} and found["agreement"] is None and found["answer_severity"] == []


def test_only_harmless_prompts_have_no_unsafe_rate() -> None:
    found = summarise(ANSWERS[4:], invites_harm)
    assert "unsafe_rate" not in found and found["by_category"] == {}


def test_prompts_of_unknown_harm_are_counted_apart() -> None:
    """They are neither in the unsafe rate nor among the harmless prompts; the mean cost is over all."""
    unknown = Prompt(text="e", meta={"harm": None, "slices": []})
    both = [answer(unknown, True, 3, False, 1, 3.0), answer(unknown, False, 3, True, 0, -1.0)]
    found = summarise([*ANSWERS, *both], lambda prompt: prompt.meta["harm"])
    known = summarise(ANSWERS, invites_harm)
    for name in ("unsafe_rate", "benign_helpfulness", "over_refusal_rate", "refusal_rate", "benign_unsafe_rate"):
        assert found[name] == known[name]
    assert found["unknown_unsafe_rate"].value == 0.5 and found["unknown_unsafe_rate"].n == 1
    assert found["mean_cost"].value == pytest.approx((0.5 + 0 - 2 - 0.5 + 1) / 5)
    assert "unknown_unsafe_rate" not in known


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        summarise([], invites_harm)


def test_differences_are_after_minus_before() -> None:
    safe = [answer(a.prompt, False, 3, False, 0, -3.0) for a in ANSWERS[::2]]  # one sample instead of two
    found = differences(ANSWERS, safe, invites_harm)
    assert found["unsafe_rate"].value == -0.25 and found["benign_helpfulness"].value == 1.5
    assert found["mean_cost"].value == -2.5 and found["over_refusal_rate"].value == -0.5


def test_collect_keeps_order_and_samples_together() -> None:
    sizes: list[int] = []

    def policy(batch: list[Prompt]) -> list[str]:
        sizes.append(len(batch))
        return [f"first take {p.text}" for p in batch]

    found = collect(policy, benchmark([HARM_A, GOOD_C]), 3, scorer=scorer, batch_size=4, progress=False)
    assert [a.prompt.text for a in found] == ["harm a"] * 3 + ["good c"] * 3
    assert sizes == [4, 2]
    assert all(a.judgement.unsafe and a.cost is not None and a.text == f"first take {a.prompt.text}" for a in found)


def test_collect_refuses_a_policy_that_drops_answers() -> None:
    with pytest.raises(ValueError, match="the policy returned 1 items for 2 prompts"):
        collect(lambda batch: ["x"], benchmark([HARM_A, GOOD_C]), progress=False)


def test_collect_refuses_a_scorer_that_drops_scores() -> None:
    asked = benchmark([HARM_A, GOOD_C])
    with pytest.raises(ValueError, match="scorer \\(costs\\) returned 1"):
        collect(lambda b: ["x"] * 2, asked, scorer=lambda p, t: ([0, 0], [0]), progress=False)


def test_progress_shows(capsys: pytest.CaptureFixture[str]) -> None:
    collect(lambda b: ["x"] * len(b), benchmark([HARM_A]), label="asking the base")
    assert "asking the base" in capsys.readouterr().out


def test_summary_is_deterministic() -> None:
    few = answers(0.5, 0.1, 1, count=30)
    assert summarise(few, invites_harm, slices_of) == summarise(few, invites_harm, slices_of)
