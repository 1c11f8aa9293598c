"""From dialogues to what student and teacher are trained on (FIRE, NeurIPS 2024), as rows for `train_sft`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from beavertails_v.dialogues import Dialogue
from beavertails_v.schema import LabelledResponse, Prompt, Response
from safe_rlhf_v.refinement.formats import Format, Review, student_prompt, student_reply, teacher_prompt, teacher_reply

FirstTurns = Literal["none", "correct", "all"]


def student_rows(
    dialogues: Sequence[Dialogue], form: Format, first_turns: FirstTurns = "correct", correct: int = 8
) -> list[LabelledResponse]:
    """Answers that scored higher than the one before, given the dialogue up to there. [ours]

    first_turns: which first answers are imitated too: "none"; "correct", those of a score of `correct` or more; "all",
    whatever they score: that holds the student's first answers where they are, so that what changes is refinement.
    """
    rows = []
    for dialogue in dialogues:
        for k, turn in enumerate(dialogue.turns):
            better = k > 0 and turn.score > dialogue.turns[k - 1].score
            first = k == 0 and (first_turns == "all" or (first_turns == "correct" and turn.score >= correct))
            if better or first:
                reply = student_reply(turn.answer, turn.thought, form)
                rows.append(_row(student_prompt(dialogue.prompt, dialogue.turns[:k], form), reply))
    return rows


def teacher_rows(dialogues: Sequence[Dialogue], form: Format) -> list[LabelledResponse]:
    """Score and feedback of every turn, given question, truth and answers. Turns without a score, and those whose
    feedback was withheld, teach nothing and are left out."""
    rows = []
    for dialogue in dialogues:
        answers = [turn.answer for turn in dialogue.turns]
        for k, turn in enumerate(dialogue.turns, 1):
            if turn.score and turn.withheld is None:
                review = Review(score=turn.score, feedback=turn.feedback)
                asked = teacher_prompt(dialogue.prompt, dialogue.truth, answers[:k], form)
                rows.append(_row(asked, teacher_reply(review, form)))
    return rows


def _row(prompt: Prompt, text: str) -> LabelledResponse:
    # fine-tuning reads prompt and text alone; a safety label has no meaning for a reply inside a dialogue
    return LabelledResponse(prompt=prompt, response=Response(text=text, safe=True))


def split_by_prompt(dialogues: Sequence[Dialogue], share: float) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, held out): about this share of the prompts, with all their dialogues, chosen by their content."""
    held = [_fraction(dialogue.prompt.id) < share for dialogue in dialogues]
    pairs = list(zip(dialogues, held, strict=True))
    return [d for d, out in pairs if not out], [d for d, out in pairs if out]


def _fraction(prompt_id: str) -> float:
    return int.from_bytes(hashlib.sha256(f"held out {prompt_id}".encode()).digest()[:4]) / 2**32
