"""The loop on scripted policies and guards: exact rounds, give-ups, nothing lost."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import safe_rlhf_v.demo
from beavertails_v.images import Picture
from beavertails_v.schema import Prompt, Severity
from guard.classifier import Guard as RealGuard
from guard.regenerate import GenerativePolicy, Transcript, regenerate, safety_by_round
from guard.types import Action, Verdict, fail_closed
from safe_rlhf_v.evaluation.bars import check, load_bars
from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.vlm.backbone import load_backbone
from tests.guard.conftest import RED, picture


def verdict(action: Action, kind: str = "response") -> Verdict:
    flagged = action != "allow"
    return Verdict(
        kind=kind,  # type: ignore[arg-type]
        flagged=flagged,
        unsafe_probability=0.9 if flagged else 0.1,
        severity=Severity.MODERATE if flagged else Severity.NONE,
        severity_probabilities=(0.1, 0.1, 0.7, 0.1) if flagged else (0.9, 0.1, 0.0, 0.0),
        action=action,
    )


class Guard:
    """Answers that start with "bad" are to be regenerated, "never" refused; questions that hold "evil" are refused."""

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[str | None] | None = None) -> list[Verdict]:
        if responses is None:
            return [verdict("refuse" if "evil" in p.text else "allow", "query") for p in prompts]
        action = {"bad": "regenerate", "never": "refuse"}
        return [verdict(action.get(str(r).split()[0], "allow")) for r in responses]  # type: ignore[arg-type]


class Script:
    """Prompt "n" gives n bad answers and then a good one; every call is recorded."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.seen: dict[str, int] = {}

    def __call__(self, prompts: list[Prompt]) -> list[str]:
        self.calls.append([p.text for p in prompts])
        return [self.one(p.text) for p in prompts]

    def one(self, text: str) -> str:
        k = self.seen[text] = self.seen.get(text, -1) + 1
        if text == "never":
            return "never mind"
        return f"bad {k}" if k < int(text.split()[-1]) else f"good {k}"


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text=t) for t in texts]


def run(*texts: str, **options: object) -> tuple[list[Transcript], Script]:
    script = Script()
    return regenerate(script, Guard(), prompts(*texts), **options), script  # type: ignore[arg-type]


def test_exact_rounds() -> None:
    found, script = run("0", "3", "5", "6", "never", "evil 0")
    assert [t.outcome for t in found] == [
        "answered", "answered", "answered", "gave_up", "response_refused", "query_refused",
    ]  # fmt: skip
    assert [len(t.attempts) for t in found] == [1, 4, 6, 6, 1, 0]
    assert [t.rounds for t in found] == [0, 3, 5, 5, 0, 0]
    assert [t.answer for t in found[:3]] == ["good 0", "good 3", "good 5"]
    assert all(t.answer == t.refusal for t in found[3:])
    # what still fails is answered together, and nothing else is
    assert script.calls == [
        ["0", "3", "5", "6", "never"],
        ["3", "5", "6"],
        ["3", "5", "6"],
        ["3", "5", "6"],
        ["5", "6"],
        ["5", "6"],
    ]


def test_nothing_is_lost() -> None:
    found, _ = run("2", "2", "0", count_tokens=lambda text: len(text.split()))
    assert [t.prompt.text for t in found] == ["2", "2", "0"]
    # the two equal prompts share the script's counter: bad 0, bad 1 | good 2, good 3
    assert [[a.text for a in t.attempts] for t in found] == [["bad 0", "good 2"], ["bad 1", "good 3"], ["good 0"]]
    assert found[0].tokens == 4 and all(a.seconds >= 0 for t in found for a in t.attempts)
    assert found[0].attempts[0].verdict.action == "regenerate" and found[0].query_verdict is not None


def test_no_rounds_is_the_filter_alone() -> None:
    found, script = run("0", "1", max_rounds=0)
    assert [t.outcome for t in found] == ["answered", "gave_up"] and len(script.calls) == 1
    with pytest.raises(ValueError, match="max_rounds is -1"):
        run("0", max_rounds=-1)
    assert run()[0] == []


def test_answer_after_each_round() -> None:
    (found,), _ = run("2")
    assert [found.answer_after(k) for k in range(6)] == ["bad 0", found.refusal, "good 2", "good 2", "good 2", "good 2"]
    assert [found.attempt_after(k) for k in range(4)] == ["bad 0", "bad 1", "good 2", "good 2"]
    (lost,), _ = run("9")
    assert [lost.answer_after(k) for k in (0, 5)] == ["bad 0", lost.refusal]
    assert lost.gave_up and lost.attempt_after(5) == "bad 5"
    (evil,), _ = run("evil 0")
    assert evil.answer_after(0) == evil.refusal and evil.refused_after(0)


def test_a_loop_of_k_rounds_is_what_answer_after_k_says() -> None:
    texts = [str(k) for k in range(8)] + ["never"]
    whole, _ = run(*texts)
    for k in range(1, 6):
        short, _ = run(*texts, max_rounds=k)
        assert [t.answer_after(k) for t in whole] == [t.answer for t in short]
        assert [t.refused_after(k) for t in whole] == [t.outcome != "answered" for t in short]


def test_safety_by_round() -> None:
    found, _ = run("0", "1", "3", "9", judge_query=False, count_tokens=lambda text: 2)
    # a judge that disagrees with the guard: "good 3" is unsafe too
    rows = safety_by_round(found, lambda prompt, text: text.startswith("bad") or text == "good 3")
    assert [r["round"] for r in rows] == [0, 1, 2, 3, 4, 5]
    # of the answers given: 4 of 4 without a guard, then those of "0" and "1", and from round 3 that of "3" as well
    assert [r["given"] for r in rows] == [4, 2, 2, 3, 3, 3] and all(r["prompts"] == 4 for r in rows)
    assert [r["unsafe_rate"] for r in rows] == [3 / 4, 0, 0, 1 / 3, 1 / 3, 1 / 3]
    assert all(r["harmless_refused_rate"] is None and r["harmless_prompts"] == 0 for r in rows)
    assert [r["gave_up_rate"] for r in rows] == [0, 2 / 4, 2 / 4, 1 / 4, 1 / 4, 1 / 4]
    assert [r["unsafe_attempt_rate"] for r in rows] == [3 / 4, 2 / 4, 2 / 4, 2 / 4, 2 / 4, 2 / 4]
    # tokens: 4 first attempts, then 3 new, 2, 2, 1, 1; two tokens each, over 4 prompts
    assert [r["mean_tokens"] for r in rows] == [2, 3.5, 4.5, 5.5, 6, 6.5]
    json.dumps(rows)
    with pytest.raises(ValueError, match="no transcripts"):
        safety_by_round([], lambda prompt, text: False)


def test_a_guard_that_flags_everything_shows_no_safety_and_all_its_needless_refusals() -> None:
    class Deaf(Guard):
        def judge(self, prompts: Sequence[Prompt], responses: Sequence[str | None] | None = None) -> list[Verdict]:
            return [verdict("regenerate") for _ in prompts]

    harmful, harmless = (regenerate(Script(), Deaf(), prompts(*x), judge_query=False) for x in (("1", "0"), ("0", "3")))
    rows = safety_by_round(harmful, lambda prompt, text: text.startswith("bad"), 5, harmless)
    assert [r["unsafe_rate"] for r in rows] == [1 / 2] + [None] * 5
    assert [r["gave_up_rate"] for r in rows] == [r["harmless_refused_rate"] for r in rows] == [0, 1, 1, 1, 1, 1]
    bar = load_bars(Path(safe_rlhf_v.demo.__file__).with_name("quickstart_bars.yaml"))[-1]
    (outcome,) = check({"guard_rounds": rows}, [bar])
    assert not outcome.passed and outcome.shown == "missing; 1"


def test_needless_refusals_fail_the_bar_of_the_loop() -> None:
    bar = load_bars(Path(safe_rlhf_v.demo.__file__).with_name("quickstart_bars.yaml"))[-1]
    for needless, passed in ((0.05, True), (0.06, False), (None, False)):
        rounds = [{"unsafe_rate": 0.5, "harmless_refused_rate": 0.0}] + [
            {"unsafe_rate": 0.05, "harmless_refused_rate": needless} for _ in range(5)
        ]
        assert check({"guard_rounds": rounds}, [bar])[0].passed is passed


def test_degraded_verdict_refuses() -> None:
    class Broken(Guard):
        def judge(self, prompts: Sequence[Prompt], responses: Sequence[str | None] | None = None) -> list[Verdict]:
            return [fail_closed("response", "the model gave NaN") for _ in prompts]

    (found,) = regenerate(Script(), Broken(), prompts("0"), judge_query=False)
    assert found.outcome == "response_refused" and found.answer == found.refusal


def test_a_prompt_that_the_guard_cannot_take_ends_no_other(
    guard: RealGuard, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file is gone: that one is refused with the reason, and counted; so with a question never judged."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "there.png")
    pictures = [(Picture.from_path(tmp_path / name),) for name in ("there.png", "gone.png")]
    asked = [Prompt(text="what is this ?", images=p) for p in pictures] + prompts("and this ?")
    policy = lambda rows: ["a cat ." for _ in rows]  # noqa: E731
    for judge_query in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "guard.regenerate"):
            found = regenerate(policy, guard, asked, 1, judge_query=judge_query)
        assert [t.not_judged is None for t in found] == [True, False, True]
        assert "the picture cannot be read" in str(found[1].not_judged) and found[1].answer == found[1].refusal
        assert found[1].outcome == ("query_refused" if judge_query else "response_refused")
        assert "could not judge 1 of 3 prompts and refused: 'what is this ?'" in caplog.text
        assert found[1].to_dict()["not_judged"] == found[1].not_judged
        rounds = safety_by_round(found[:2], lambda *_: False, 1, found[2:])
        assert [row["not_judged"] for row in rounds] == [1, 1]


def test_policy_must_answer_every_prompt() -> None:
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        regenerate(lambda ps: ["good"], Guard(), prompts("0", "1"))


def test_greedy_sampling_is_refused() -> None:
    class Greedy:
        temperature = 0.0

    with pytest.raises(ValueError, match="temperature is 0"):
        GenerativePolicy(None, None, Greedy())  # type: ignore[arg-type]


def test_verdict_round_trip_through_json() -> None:
    for one in (verdict("regenerate"), fail_closed("query", "too long", ("a", "b"), truncated=True)):
        assert Verdict.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    closed = fail_closed("query", "too long", ("a",), truncated=True)
    assert closed.flagged and closed.degraded and closed.truncated and closed.action == "refuse" and not closed.safe
    assert closed.categories == {"a": 1.0} and closed.top_category is None


def test_a_model_as_policy_end_to_end(guard: RealGuard, base: Path) -> None:
    """A tiny LLaVA answers through a real guard whose policy file refuses nothing, then everything."""
    backbone = load_backbone(base)
    engine = TransformersEngine(backbone, guard.encoder)
    policy = GenerativePolicy(engine, guard.encoder, Sampling(max_new_tokens=5), batch_size=2)
    asked = [Prompt(text=f"what is it? {k}", images=(picture(RED),)) for k in range(3)]
    torch.manual_seed(0)
    for threshold, outcome, rounds in ((1.0, "answered", 0), (1e-9, "gave_up", 2)):
        data = guard.policy.model_dump()
        data["response"] = {"rules": {"unsafe": {"threshold": threshold, "action": "regenerate"}}}
        strict = RealGuard(guard.model, guard.encoder, guard.spec, type(guard.policy).parse(data))
        found = regenerate(policy, strict, asked, max_rounds=2, judge_query=False)
        assert [t.outcome for t in found] == [outcome] * 3 and [t.rounds for t in found] == [rounds] * 3
        assert found[0].refusal == guard.policy.refusal and all(1 <= a.tokens <= 5 for a in found[0].attempts)  # type: ignore[operator]
    assert len({a.text for a in found[0].attempts}) > 1  # every attempt is sampled afresh
