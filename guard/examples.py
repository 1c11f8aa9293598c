"""What the guard learns from: labelled queries and responses, and which kinds the data can teach at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from beavertails_v.schema import LabelledResponse, Prompt, Severity
from guard.calibration import Labels
from guard.types import Kind
from safe_rlhf_v.training.encode import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One query (response None) or response with its labels; None is unknown.

    category: of the harm, None for a safe example and for an unsafe one whose category the data does not give.
    """

    prompt: Prompt
    response: str | None
    unsafe: bool
    severity: Severity | None
    category: str | None

    @property
    def kind(self) -> Kind:
        return "query" if self.response is None else "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What one forward teaches: a query, a response, or a response and the query before it. Not both are None."""

    query: Example | None
    response: Example | None

    @property
    def last(self) -> Example:
        """The example whose text the forward reads to its end."""
        return self.response or self.query  # type: ignore[return-value]


def query_example(prompt: Prompt) -> Example:
    """A prompt is unsafe where its labels say that it invites harm. A safe one has severity NONE."""
    unsafe = bool(prompt.harmful)
    severity = prompt.severity if unsafe else Severity.NONE
    return Example(prompt=prompt, response=None, unsafe=unsafe, severity=severity, category=prompt.category)


def response_example(row: LabelledResponse) -> Example:
    """A response is unsafe as labelled; its own category, else the prompt's, where it is."""
    unsafe = not row.response.safe
    category = (row.response.category or row.prompt.category) if unsafe else None
    return Example(
        prompt=row.prompt,
        response=row.response.text,
        unsafe=unsafe,
        severity=row.response.severity,
        category=category,
    )


def unique_prompts(data: Iterable[LabelledResponse], benign: Iterable[Prompt] = ()) -> list[Prompt]:
    """Prompts of the data and the benign set, once each, in order; the benign set speaks where the data is silent.

    Raises DataError for a prompt of the benign set that is labelled harmful.
    """
    found: dict[str, Prompt] = {}
    for prompt in (row.prompt for row in data):
        found.setdefault(prompt.id, prompt)
    for prompt in benign:
        if prompt.harmful:
            label = f"category {prompt.category!r}" if prompt.category else f"severity {int(prompt.severity or 0)}"
            raise DataError(f"benign prompt {prompt.id} has {label}; leave it out of the benign set")
        if found.get(prompt.id, prompt).harmful is None or prompt.id not in found:
            found[prompt.id] = replace(prompt, benign=True)
    return list(found.values())


def examples_of(data: Sequence[LabelledResponse], benign: Sequence[Prompt] = ()) -> dict[Kind, list[Example]]:
    """Queries (each prompt once, where it is known whether it invites harm) and responses.

    benign: harmless by their source. Raises DataError for one that is labelled harmful.
    """
    return {
        "query": [query_example(p) for p in unique_prompts(data, benign) if p.harmful is not None],
        "response": [response_example(row) for row in data],
    }


def unknown_queries(examples: Mapping[Kind, Sequence[Example]]) -> int:
    """How many prompts with responses are labelled neither harmful nor harmless, and so are no queries."""
    return len({e.prompt.id for e in examples["response"]} - {e.prompt.id for e in examples["query"]})


def teachable(examples: Sequence[Example]) -> bool:
    """Whether there are both safe and unsafe ones: one kind alone teaches a head to say the same always."""
    return len({e.unsafe for e in examples}) == 2


def held_out(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(rest, held out): about `fraction` of the prompts, by their content, so that a prompt is wholly on one side."""
    chosen = [int(e.prompt.id, 16) % 10_000 < fraction * 10_000 for e in examples]
    return (
        [e for e, out in zip(examples, chosen, strict=True) if not out],
        [e for e, out in zip(examples, chosen, strict=True) if out],
    )


def lessons_of(queries: Sequence[Example], responses: Sequence[Example]) -> list[Lesson]:
    """Each response with its query, where that is among `queries`; queries that no response follows on their own."""
    asked = {q.prompt.id: q for q in queries}
    lessons = [Lesson(query=asked.get(r.prompt.id), response=r) for r in responses]
    answered = {r.prompt.id for r in responses}
    return lessons + [Lesson(query=q, response=None) for name, q in asked.items() if name not in answered]


def lesson_labels(lessons: Sequence[Lesson], categories: Sequence[str]) -> Labels:
    """Labels of 2B rows, the queries and then the responses; what a lesson lacks is unknown."""
    wanted = [lesson.query for lesson in lessons] + [lesson.response for lesson in lessons]
    filled = [e or lesson.last for e, lesson in zip(wanted, [*lessons, *lessons], strict=True)]
    labels = labels_of(filled, categories)
    is_response = torch.arange(len(filled)) >= len(lessons)
    return replace(labels, is_response=is_response).known_where(torch.tensor([e is not None for e in wanted]))


def labels_of(examples: Sequence[Example], categories: Sequence[str]) -> Labels:
    """Tensors of labels. A safe example is in no category; an unsafe one without a category has them all unknown.

    Raises DataError for a category that is not in `categories`.
    """
    index = {name: k for k, name in enumerate(categories)}
    marks = torch.zeros(len(examples), len(categories), dtype=torch.long)
    for i, example in enumerate(examples):
        if example.category is not None:
            if example.category not in index:
                raise DataError(f"prompt {example.prompt.id}: category {example.category!r} is not in the taxonomy")
            marks[i, index[example.category]] = 1
        elif example.unsafe:
            marks[i] = -1
    return Labels(
        is_response=torch.tensor([e.response is not None for e in examples]),
        unsafe=torch.tensor([int(e.unsafe) for e in examples]),
        severity=torch.tensor([-1 if e.severity is None else int(e.severity) for e in examples]),
        categories=marks,
    )
