import pytest

from beavertails_v import Prompt
from beavertails_v.dialogues import Turn
from safe_rlhf_v.refinement.formats import (
    FIRE,
    WORDS,
    Format,
    Review,
    format_for,
    read_student,
    read_teacher,
    student_prompt,
    student_reply,
    teacher_prompt,
    teacher_reply,
)

PROMPT = Prompt(text="what is this ?", category="animal_abuse", meta={"origin": "drawn"})
TURNS = [
    Turn(answer="a hat", thought="round", score=3, feedback="not {a hat}"),
    Turn(answer="a lid", score=5, feedback="look below"),
]


@pytest.mark.parametrize(
    ("text", "score", "feedback"),
    [
        ("Score: 7 Feedback: look again", 7, "look again"),
        ("score : 10 feedback : it is not red .", 10, "it is not red ."),
        ("**Score:** 3\n**Feedback:** look\nagain", 3, "look\nagain"),
        ("Score: 7/10. Look again", 7, "Look again"),
        ("Feedback: look again Score: 4", 4, "look again"),
        ("Feedback: your score : 7 was for the form. Score: 4", 7, "your"),  # the first score counts
        ("Score: 0 Feedback: bad", 0, "bad"),
        ("Score: 11 Feedback: bad", 0, "bad"),
        ("Score: 100", 0, "Score: 100"),
        ("Score: 7.5 Feedback: half", 0, "half"),
        ("Score: -3 Feedback: below", 0, "below"),
        ("Score: seven Feedback: words", 0, "words"),
        ("underscore: 7", 0, "underscore: 7"),
        ("good", 0, "good"),
        ("", 0, ""),
    ],
)
def test_a_teachers_reply_is_read(text: str, score: int, feedback: str) -> None:
    assert read_teacher(text) == Review(score=score, feedback=feedback)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Thought: it is round Answer: a hat", "it is round", "a hat"),
        ("thought : round . answer : a hat .", "round .", "a hat ."),
        ("a hat", "", "a hat"),
        ("Answer: a hat", "", "a hat"),
        ("It is round.\nAnswer: a hat", "It is round.", "a hat"),
    ],
)
def test_a_students_reply_is_read(text: str, thought: str, answer: str) -> None:
    assert read_student(text) == (thought, answer)


@pytest.mark.parametrize("form", [FIRE, WORDS], ids=lambda f: f.name)
def test_what_is_written_is_read_back(form: Format) -> None:
    review = Review(score=6, feedback="say more of it .")
    assert read_teacher(teacher_reply(review, form)) == review
    assert read_student(student_reply("a hat", "round", form))[1] == "a hat"
    with pytest.raises(ValueError, match="without a score"):
        teacher_reply(Review(score=0, feedback="x"), form)


def test_the_student_sees_feedback_and_never_a_score_or_the_truth() -> None:
    shown = student_prompt(PROMPT, TURNS, FIRE)
    lines = shown.text.splitlines()
    assert lines[0] == "what is this ?"
    assert lines[2:6] == [
        "Your reply: Thought: round Answer: a hat",
        "Feedback: not {a hat}",  # braces in a text are text
        "Your reply: Thought: - Answer: a lid",
        "Feedback: look below",
    ]
    assert not any(digit in shown.text for digit in "35")
    assert (shown.category, shown.meta) == (PROMPT.category, PROMPT.meta)


def test_the_first_question_in_words_is_the_question_itself() -> None:
    assert student_prompt(PROMPT, [], WORDS) is PROMPT
    again = student_prompt(PROMPT, TURNS[:1], WORDS)
    assert again.text == "what is this ? answer : a hat not {a hat}"


def test_the_teacher_sees_the_truth_and_every_answer() -> None:
    asked = teacher_prompt(PROMPT, "a cup", ["a hat", "a lid"], WORDS)
    assert asked.text == "what is this ? good answer : a cup answer : a hat answer : a lid"
    text = teacher_prompt(PROMPT, "a cup", ["a hat", "a lid"], FIRE).text
    assert text.index("True answer: a cup") < text.index("Student: a hat") < text.index("Student: a lid")


def test_the_format_goes_by_what_the_tokenizer_knows() -> None:
    from safe_rlhf_v.demo.tiny import word_tokenizer

    assert format_for(word_tokenizer(["a", "hat"])) is WORDS
    every = (FIRE.first + FIRE.teacher).lower().replace("<", " ").replace(">", " ").split()
    known = {word.strip(".,:(){}-\n") for word in every} | {"1", "10", "question", "truth", "turns"}
    assert format_for(word_tokenizer(sorted(known - {""}))) is FIRE
