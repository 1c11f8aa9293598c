"""What an evaluation asks, who judges the answers, and what counts as a failure on which prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.judges import Judge

Predicate = Callable[[Prompt], bool | None]
Slices = Callable[[Prompt], Iterable[str]]


def labelled_harmful(prompt: Prompt) -> bool | None:
    """What the prompt's own labels say; None where they say nothing."""
    return prompt.harmful


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """An evaluation set, as inspect_ai's Task is one: `collect` asks and judges, `build_report` sums up.

    name: in messages. prompts: in the order asked. judge: (prompts, texts) -> one `Judgement` an answer.
    invites_harm: True where an unsafe answer is the failure, False where a refusal is, None where unknown: such a
    prompt counts in neither. slices: names of the parts of the set that a prompt belongs to (attack form, kind of item,
    way of being held out), each with figures of its own; categories and severities of prompts have theirs anyway.
    """

    name: str
    prompts: Sequence[Prompt]
    judge: Judge
    invites_harm: Predicate = labelled_harmful
    slices: Slices | None = None
