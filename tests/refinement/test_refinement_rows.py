import pytest

from beavertails_v import Prompt
from beavertails_v.dialogues import Dialogue, Turn
from safe_rlhf_v.refinement.formats import FIRE, WORDS
from safe_rlhf_v.refinement.rows import FirstTurns, split_by_prompt, student_rows, teacher_rows


def dialogue(*turns: Turn, text: str = "what ?") -> Dialogue:
    return Dialogue(prompt=Prompt(text=text), truth="a cup", turns=turns)


ROSE = dialogue(
    Turn(answer="hat", score=2, feedback="not hat"),
    Turn(answer="lid", score=4, feedback="not lid"),
    Turn(answer="mug", score=4, feedback="it is a cup", withheld=None),
)
RIGHT = dialogue(Turn(answer="cup", score=9, feedback="good"))


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("none", [("what ? answer : hat not hat", "lid")]),
        ("correct", [("what ? answer : hat not hat", "lid"), ("what ?", "cup")]),
        ("all", [("what ?", "hat"), ("what ? answer : hat not hat", "lid"), ("what ?", "cup")]),
    ],
)
def test_students_imitate_what_improved(first: FirstTurns, expected: list[tuple[str, str]]) -> None:
    """hat 2 -> lid 4 rose; lid 4 -> mug 4 did not."""
    rows = student_rows([ROSE, RIGHT], WORDS, first)
    assert [(r.prompt.text, r.response.text) for r in rows] == expected


def test_thoughts_are_part_of_the_reply() -> None:
    turns = (Turn(answer="hat", score=2, thought="round"), Turn(answer="cup", score=9, thought="an ear"))
    (row,) = student_rows([dialogue(*turns)], FIRE, "none")
    assert row.response.text == "Thought: an ear Answer: cup"
    assert "Thought: round Answer: hat" in row.prompt.text


def test_teachers_imitate_every_review_that_can_be_learned_from() -> None:
    unread = dialogue(Turn(answer="hat", score=0, feedback="?"))
    leaked = dialogue(Turn(answer="hat", score=3, feedback="this is not good .", withheld="it is a cup"))
    rows = teacher_rows([ROSE, unread, leaked], WORDS)
    assert [(r.prompt.text, r.response.text) for r in rows] == [
        ("what ? good answer : a cup answer : hat", "score : 2 feedback : not hat"),
        ("what ? good answer : a cup answer : hat answer : lid", "score : 4 feedback : not lid"),
        ("what ? good answer : a cup answer : hat answer : lid answer : mug", "score : 4 feedback : it is a cup"),
    ]


def test_a_prompt_is_on_one_side_of_the_split() -> None:
    many = [dialogue(Turn(answer="x", score=1), text=f"{i % 200} ?") for i in range(400)]
    train, held = split_by_prompt(many, 0.25)
    assert len(train) + len(held) == 400
    assert 60 < len(held) < 140  # 100 expected, in 50 prompts: sd 2 * sqrt(200/4*3/4) = 12
    assert not {d.prompt.id for d in train} & {d.prompt.id for d in held}
    assert split_by_prompt(many, 0.25) == (train, held)
