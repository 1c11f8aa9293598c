"""A trained model as teacher: it writes "Score: ... Feedback: ...", and its words are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safe_rlhf_v.refinement.formats import Format, Review, read_teacher, teacher_prompt
from safe_rlhf_v.refinement.protocol import Case, Student


@dataclass(frozen=True)
class ModelTeacher:
    """generate: replies to prompts, as a student's; greedy decoding makes the scores repeatable."""

    generate: Student
    form: Format

    def __call__(self, cases: Sequence[Case], answers: Sequence[Sequence[str]]) -> list[Review]:
        asked = [teacher_prompt(c.prompt, c.truth, said, self.form) for c, said in zip(cases, answers, strict=True)]
        return [read_teacher(reply) for reply in self.generate(asked)]
