from collections.abc import Sequence

import pytest

from beavertails_v import Prompt
from beavertails_v.dialogues import Dialogue
from safe_rlhf_v.refinement.formats import WORDS, Review
from safe_rlhf_v.refinement.protocol import Case, Mode, Rules, run_dialogues, stop_reason

SCORES = {"cup": 10, "mug": 7, "hat": 2, "lid": 4, "?": 0}


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([8], "correct"),
        ([7], None),
        ([0], "unparsable"),
        ([2, 3], None),
        ([2, 2], "no_rise"),
        ([5, 4], "no_rise"),
        ([2, 0], "unparsable"),
        ([7, 8], "correct"),
        ([9, 8], "correct"),
        ([1, 2, 3], None),
        ([1, 2, 3, 4], "max_turns"),
    ],
)
def test_when_a_dialogue_ends(scores: list[int], reason: str | None) -> None:
    assert stop_reason(scores, Rules(max_turns=4)) == reason


class Script:
    """A student that says what it is told to, question by question, and remembers what it was shown."""

    def __init__(self, **answers: str) -> None:
        self.answers = {f"{name} ?": words.split() for name, words in answers.items()}
        self.shown: list[str] = []

    def __call__(self, prompts: list[Prompt]) -> list[str]:
        self.shown += [p.text for p in prompts]
        return [self.answers[p.text.split("?")[0] + "?"].pop(0) for p in prompts]


def teach(cases: Sequence[Case], answers: Sequence[Sequence[str]]) -> list[Review]:
    return [Review(score=SCORES[said[-1]], feedback=f"not {said[-1]}") for said in answers]


def case(name: str) -> Case:
    return Case(prompt=Prompt(text=f"{name} ?"), truth="a cup")


def talk(student: Script, *names: str, mode: Mode = "guided", max_turns: int = 5) -> list[Dialogue]:
    return run_dialogues(student, teach, [case(n) for n in names], WORDS, Rules(max_turns=max_turns), mode)


def test_each_dialogue_ends_by_itself() -> None:
    student = Script(a="cup", b="hat lid mug cup", c="hat hat", d="?", e="lid hat", f="hat lid mug")
    found = talk(student, *"abcdef", max_turns=3)
    assert [d.scores for d in found] == [(10,), (2, 4, 7), (2, 2), (0,), (4, 2), (2, 4, 7)]
    assert [d.prompt.text for d in found] == [f"{n} ?" for n in "abcdef"]
    assert {d.source for d in found} == {"free/guided"}
    assert student.answers["b ?"] == ["cup"]  # the fourth answer was never asked for


@pytest.mark.parametrize(
    ("mode", "second", "third"),
    [
        ("guided", "b ? answer : hat not hat", "b ? answer : hat not hat answer : lid not lid"),
        ("blind", "b ?", "b ?"),
        (
            "neutral",
            "b ? answer : hat this is not good .",
            "b ? answer : hat this is not good . answer : lid this is not good .",
        ),
    ],
)
def test_what_the_student_is_shown(mode: Mode, second: str, third: str) -> None:
    student = Script(b="hat lid cup")
    (dialogue,) = talk(student, "b", mode=mode)
    assert student.shown == ["b ?", second, third]
    assert [t.feedback for t in dialogue.turns] == ["not hat", "not lid", "not cup"]  # what the teacher said, always


def test_feedback_that_leaks_is_withheld_and_kept_on_record() -> None:
    def tells(cases: Sequence[Case], answers: Sequence[Sequence[str]]) -> list[Review]:
        return [Review(score=SCORES[said[-1]], feedback="it is a cup") for said in answers]

    student = Script(b="hat cup")
    (dialogue,) = run_dialogues(student, tells, [case("b")], WORDS)
    assert student.shown[1] == "b ? answer : hat this is not good ."
    assert dialogue.turns[0].withheld == "it is a cup"
    assert dialogue.turns[1].withheld is None  # by then the student has said cup itself
    assert dialogue.turns[1].feedback == "it is a cup"


def test_thoughts_are_kept_apart_from_answers() -> None:
    student = Script(b="x")
    student.answers["b ?"] = ["thought : round answer : cup"]
    (dialogue,) = talk(student, "b")
    assert (dialogue.turns[0].thought, dialogue.turns[0].answer) == ("round", "cup")


def test_one_reply_a_question() -> None:
    with pytest.raises(ValueError, match="the student gave 0 replies to 1 questions"):
        run_dialogues(lambda prompts: [], teach, [case("b")], WORDS)
    with pytest.raises(ValueError, match="the teacher gave 0 replies to 1 questions"):
        run_dialogues(Script(b="cup"), lambda cases, answers: [], [case("b")], WORDS)
    assert run_dialogues(Script(), teach, [], WORDS) == []


@pytest.mark.parametrize("wrong", [{"correct": 0}, {"correct": 11}, {"max_turns": 0}, {"leak_share": 1.0}])
def test_rules_within_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="correct is in 1..10"):
        Rules(**wrong)  # type: ignore[arg-type]
