"""The student-teacher dialogue of FIRE (NeurIPS 2024) [code]: answer, score and feedback, answer again.

The student sees the feedback alone; the teacher sees the truth. A dialogue ends with a score of 8 or more, with a score
that cannot be read (0), with one that does not rise, or at the last turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from beavertails_v.dialogues import Dialogue, Turn
from beavertails_v.schema import Prompt
from safe_rlhf_v.arguments import Rules
from safe_rlhf_v.refinement.formats import Format, Review, read_student, student_prompt
from safe_rlhf_v.refinement.leaks import leaks

RULES = Rules()
Student = Callable[[list[Prompt]], Sequence[str]]
"""Replies to prompts that `student_prompt` made, one each, in order."""
Teacher = Callable[[Sequence["Case"], Sequence[Sequence[str]]], Sequence[Review]]
"""(cases, the student's answers so far to each, newest last) -> a review of each newest answer."""
Mode = Literal["guided", "blind", "neutral"]
Stop = Literal["correct", "unparsable", "no_rise", "max_turns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question and its true answer."""

    prompt: Prompt
    truth: str


def stop_reason(scores: Sequence[int], rules: Rules = RULES) -> Stop | None:
    """Why a dialogue with these scores is over, or None where the student answers again."""
    last = scores[-1]
    if last >= rules.correct:
        return "correct"
    if last == 0:
        return "unparsable"
    if len(scores) > 1 and last <= scores[-2]:
        return "no_rise"
    return "max_turns" if len(scores) >= rules.max_turns else None


def run_dialogues(
    student: Student,
    teacher: Teacher,
    cases: Sequence[Case],
    form: Format,
    rules: Rules = RULES,
    mode: Mode = "guided",
) -> list[Dialogue]:
    """One dialogue a case, in order; all that are still open take each turn together.

    mode: "guided", the student sees the turns so far; "blind", it sees the question alone, as regeneration does;
    "neutral", it sees the turns with the same empty sentence in place of every feedback, which tells the use of
    feedback from the use of being asked again. Feedback that leaks is withheld, and a neutral sentence shown.
    """
    turns: list[list[Turn]] = [[] for _ in cases]
    waiting = list(range(len(cases)))
    while waiting:
        asked = [student_prompt(cases[i].prompt, _seen(turns[i], form, mode), form) for i in waiting]
        replies = [read_student(text) for text in _one_each(student(asked), asked, "student")]
        answers = [(*(t.answer for t in turns[i]), reply[1]) for i, reply in zip(waiting, replies, strict=True)]
        some = [cases[i] for i in waiting]
        reviews = _one_each(teacher(some, answers), some, "teacher")
        for i, (thought, answer), said, review in zip(waiting, replies, answers, reviews, strict=True):
            turns[i].append(_turn(cases[i], thought, answer, said, review, form, rules))
        waiting = [i for i in waiting if stop_reason([t.score for t in turns[i]], rules) is None]
    return [
        Dialogue(prompt=case.prompt, truth=case.truth, turns=tuple(made), source=f"free/{mode}")
        for case, made in zip(cases, turns, strict=True)
    ]


def _seen(turns: Sequence[Turn], form: Format, mode: Mode) -> list[Turn]:
    if mode == "blind":
        return []
    if mode == "guided":
        return list(turns)
    return [Turn(answer=t.answer, score=t.score, thought=t.thought, feedback=form.neutral) for t in turns]


def _turn(
    case: Case, thought: str, answer: str, said: Sequence[str], review: Review, form: Format, rules: Rules
) -> Turn:
    hidden = leaks(review.feedback, case.truth, said, case.prompt.text, rules.leak_share)
    return Turn(
        answer=answer,
        thought=thought,
        score=review.score,
        feedback=form.neutral if hidden else review.feedback,
        withheld=review.feedback if hidden else None,
    )


def _one_each(found: Sequence[Review] | Sequence[str], asked: Sequence[object], who: str) -> Sequence:  # type: ignore[type-arg]
    if len(found) != len(asked):
        raise ValueError(f"the {who} gave {len(found)} replies to {len(asked)} questions; give one each, in order")
    return found
