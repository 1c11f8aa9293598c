"""Student and teacher against given dialogues: FIRE's fixed setting (NeurIPS 2024) [code].

Each continues the dialogue as it was given, never its own: the student's next answer is compared with the given one,
and the teacher's score and feedback with the given ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from beavertails_v.dialogues import Dialogue, DialogueError
from safe_rlhf_v.refinement.formats import Format, read_student, student_prompt
from safe_rlhf_v.refinement.leaks import leaks
from safe_rlhf_v.refinement.metrics import score_error
from safe_rlhf_v.refinement.ngrams import bleu, cider
from safe_rlhf_v.refinement.protocol import Case, Student, Teacher


def student_against(dialogues: Sequence[Dialogue], student: Student, form: Format) -> dict[str, Any]:
    """BLEU-1..4 and CIDEr of the answers after feedback. Raises DialogueError where no dialogue has a second turn."""
    places = [(d, k) for d in dialogues for k in range(1, len(d.turns))]
    if not places:
        raise DialogueError("no dialogue has a second turn: there is no answer to feedback to compare with")
    replies = student([student_prompt(d.prompt, d.turns[:k], form) for d, k in places])
    return similarity([read_student(r)[1] for r in replies], [d.turns[k].answer for d, k in places])


def teacher_against(
    dialogues: Sequence[Dialogue], teacher: Teacher, correct: int = 8, leak_share: float = 0.0
) -> dict[str, Any]:
    """Score error, similarity of the feedback, and the share of feedback that gives the answer away.

    Turns whose score could not be read, or whose feedback was withheld, say nothing of what was meant and are left out.
    Raises DialogueError where none is left.
    """
    places = [(d, k) for d in dialogues for k, turn in enumerate(d.turns, 1) if turn.score and turn.withheld is None]
    if not places:
        raise DialogueError("no turn has a score and feedback: there is nothing to compare with")
    cases = [Case(prompt=d.prompt, truth=d.truth) for d, _ in places]
    said = [tuple(turn.answer for turn in d.turns[:k]) for d, k in places]
    found, given = teacher(cases, said), [d.turns[k - 1] for d, k in places]
    hidden = [
        leaks(r.feedback, c.truth, answers, c.prompt.text, leak_share)
        for r, c, answers in zip(found, cases, said, strict=True)
    ]
    return {
        "score": asdict(score_error([r.score for r in found], [t.score for t in given], correct)),
        "feedback": similarity([r.feedback for r in found], [t.feedback for t in given]),
        "leak_rate": sum(hidden) / len(hidden),
    }


def similarity(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """n, BLEU-1..4 (0..1), CIDEr (0..10), and the share that is word for word the same."""
    same = sum(a.split() == b.split() for a, b in zip(texts, references, strict=True)) / len(texts)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(texts, references), 1)}
    return {"n": len(texts), **scores, "cider": cider(texts, references), "identical": same}
