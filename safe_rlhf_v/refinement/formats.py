"""How student and teacher speak: the words around what they say, and how their replies are read.

FIRE (NeurIPS 2024) [code]: the student says "Thought: ... Answer: ...", the teacher "Score: 1-10" and "Feedback: ...".
A dialogue so far is folded into the text of one question, by `student_prompt` and `teacher_prompt` alone, so that
encoders, guards and files need to know nothing of dialogues.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from beavertails_v.dialogues import Turn
from beavertails_v.schema import Prompt

_SCORE = re.compile(r"\bscore\s*\**\s*:\s*\**\s*(10|[1-9])(?!\d|\s?\.\s?\d)", re.I)
_FEEDBACK = re.compile(r"\bfeedback\s*\**\s*:\s*\**", re.I)
_THOUGHT, _ANSWER = (re.compile(rf"\b{word}\s*\**\s*:\s*\**", re.I) for word in ("thought", "answer"))
CLOSING = re.compile(r"^\s*/\s*10\b[\s.;,]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What a teacher says of an answer. score: 1..10, or 0 where its reply cannot be read."""

    score: int
    feedback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Templates. {question} {reply} {feedback} {truth} {turns} are filled in.

    first, again: the student's question without and with turns before it; turn: one of these. teacher: its question.
    said: a turn in the teacher's question. neutral: what a student sees in place of withheld feedback.
    thoughts: the student is asked to think aloud.
    """

    name: str
    first: str
    again: str
    turn: str
    teacher: str
    said: str
    score: str
    neutral: str
    thoughts: bool


FIRE = Format(
    name="fire",
    first="{question}\n\nReply in the form: Thought: <your reasoning> Answer: <your answer>",
    again=(
        "{question}\n\n{turns}\n\nUse the feedback. Reply in the form: Thought: <your reasoning> Answer: <your answer>"
    ),
    turn="Your reply: {reply}\nFeedback: {feedback}",
    teacher=(
        "A student answers a question about the picture.\nQuestion: {question}\nTrue answer: {truth}\n\n{turns}\n\n"
        "Score the newest reply from 1 (bad) to 10 (perfect). Say what is wrong with it and how to find the answer. "
        "Never say the true answer, or any part of it that the student has not said.\n"
        "Reply in the form: Score: <1-10> Feedback: <your feedback>"
    ),
    said="Student: {reply}",
    score="Score: {score} Feedback: {feedback}",
    neutral="This is not right yet. Look at the picture and the question again.",
    thoughts=True,
)

# For models that know words alone: everything the student reads is in the picture world's vocabulary.
WORDS = Format(
    name="words",
    first="{question}",
    again="{question} {turns}",
    turn="answer : {reply} {feedback}",
    teacher="{question} good answer : {truth} {turns}",
    said="answer : {reply}",
    score="score : {score} feedback : {feedback}",
    neutral="this is not good .",
    thoughts=False,
)


def format_for(tokenizer: Any) -> Format:
    """FIRE's, or WORDS where the tokenizer does not know FIRE's words."""
    return WORDS if unknown_words(tokenizer, FIRE.first + FIRE.teacher) else FIRE


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that the tokenizer cannot tell apart: those it reads as its unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+", text))
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def student_prompt(prompt: Prompt, turns: Sequence[Turn], form: Format) -> Prompt:
    """The question with every turn so far: the student's replies and the feedback, never the scores."""
    lines = [form.turn.format(reply=_reply(turn, form), feedback=turn.feedback) for turn in turns]
    return _asking(prompt, _fill(form.again if turns else form.first, question=prompt.text, turns=_joined(lines, form)))


def teacher_prompt(prompt: Prompt, truth: str, answers: Sequence[str], form: Format) -> Prompt:
    """The question with the true answer and the student's answers so far, the newest last."""
    lines = [_fill(form.said, reply=answer) for answer in answers]
    return _asking(prompt, _fill(form.teacher, question=prompt.text, truth=truth, turns=_joined(lines, form)))


def _fill(template: str, **values: str) -> str:
    return template.format(**values)


def _joined(lines: Sequence[str], form: Format) -> str:
    return (" " if form.name == "words" else "\n").join(lines)


def _asking(prompt: Prompt, text: str) -> Prompt:
    return prompt if text == prompt.text else replace(prompt, text=text)


def _reply(turn: Turn, form: Format) -> str:
    return student_reply(turn.answer, turn.thought, form)


def student_reply(answer: str, thought: str, form: Format) -> str:
    """A student's reply as it is written: what it is trained to say."""
    return f"Thought: {thought or '-'} Answer: {answer}" if form.thoughts else answer


def teacher_reply(review: Review, form: Format) -> str:
    """A teacher's reply as it is written. Raises ValueError for a score that could not be read."""
    if review.score == 0:
        raise ValueError("a review without a score (0) cannot be written; leave the turn out")
    return _fill(form.score, score=str(review.score), feedback=review.feedback)


def read_student(text: str) -> tuple[str, str]:
    """(thought, answer) of a reply; one without "Answer:" is all answer."""
    marker = _ANSWER.search(text)
    if marker is None:
        return "", text.strip()
    thought = _THOUGHT.sub("", text[: marker.start()], count=1)
    return thought.strip(), text[marker.end() :].strip()


def read_teacher(text: str) -> Review:
    """Score and feedback of a reply. Without a whole number 1..10 after "Score:" the score is 0 [code]."""
    score, feedback = _SCORE.search(text), _FEEDBACK.search(text)
    start = feedback.end() if feedback else score.end() if score else 0
    end = score.start() if score and feedback and score.start() > feedback.end() else len(text)
    rest = text[start:end] if feedback else CLOSING.sub("", text[start:end])
    return Review(score=int(score.group(1)) if score else 0, feedback=rest.strip())
