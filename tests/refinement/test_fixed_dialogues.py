from collections.abc import Sequence

import pytest

from beavertails_v import Prompt
from beavertails_v.dialogues import Dialogue, DialogueError, Turn
from safe_rlhf_v.refinement.fixed import student_against, teacher_against
from safe_rlhf_v.refinement.formats import WORDS, Review
from safe_rlhf_v.refinement.model_teacher import ModelTeacher
from safe_rlhf_v.refinement.protocol import Case

GIVEN = [
    Dialogue(
        prompt=Prompt(text="what ?"),
        truth="a cup",
        turns=(
            Turn(answer="a hat", score=2, feedback="not a hat here"),
            Turn(answer="the mug there", score=6, feedback="near to it"),
        ),
    ),
    Dialogue(prompt=Prompt(text="who ?"), truth="a bird", turns=(Turn(answer="a bird", score=10, feedback="good"),)),
]


def test_the_student_continues_the_given_dialogue() -> None:
    asked: list[str] = []

    def student(prompts: list[Prompt]) -> list[str]:
        asked.extend(p.text for p in prompts)
        return ["the mug here"]

    found = student_against(GIVEN, student, WORDS)
    assert asked == ["what ? answer : a hat not a hat here"]
    assert found["n"] == 1
    assert found["bleu_1"] == pytest.approx(2 / 3)
    assert found["bleu_2"] == pytest.approx((2 / 3 * 1 / 2) ** 0.5)
    with pytest.raises(DialogueError, match="no dialogue has a second turn"):
        student_against(GIVEN[1:], student, WORDS)


def test_the_teacher_reviews_the_given_answers() -> None:
    """Scores 3, 0 (as 10), 10 against 2, 6, 10: (1 + 4 + 0)/3. The second feedback says cup, which nobody has said."""
    replies = iter(["score : 3 feedback : not a hat here", "it is a cup", "score : 10 feedback : good"])
    asked: list[str] = []

    def generate(prompts: list[Prompt]) -> list[str]:
        asked.extend(p.text for p in prompts)
        return [next(replies) for _ in prompts]

    found = teacher_against(GIVEN, ModelTeacher(generate, WORDS))
    assert asked[1] == "what ? good answer : a cup answer : a hat answer : the mug there"
    assert found["score"]["mae"] == pytest.approx(5 / 3)
    assert found["score"]["unparsed"] == pytest.approx(1 / 3)
    assert found["leak_rate"] == pytest.approx(1 / 3)
    assert found["feedback"]["identical"] == pytest.approx(2 / 3)


def test_turns_that_say_nothing_are_left_out() -> None:
    def teacher(cases: Sequence[Case], answers: Sequence[Sequence[str]]) -> list[Review]:
        return [Review(score=5, feedback="x") for _ in cases]

    unread = Dialogue(prompt=Prompt(text="what ?"), truth="a", turns=(Turn(answer="b", score=0),))
    assert teacher_against([unread, *GIVEN], teacher)["score"]["n"] == 3
    with pytest.raises(DialogueError, match="nothing to compare with"):
        teacher_against([unread], teacher)
