"""Checks on loaded data: what training and evaluation share, and how far the labels agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from beavertails_v.load import NoUsableRow, load_comparisons
from beavertails_v.report import LoadReport
from beavertails_v.schema import Comparison, LabelledResponse, Prompt
from beavertails_v.sources import SourceError

Record = Comparison | LabelledResponse | Prompt


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """What two sets share. Each maps the shared thing to its positions in (train, evaluation).

    pictures: by SHA-256 of the encoded file, so a re-saved picture is another one. questions: by text, blanks and case
    aside. prompts: by id, question and pictures together.
    """

    pictures: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    questions: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    prompts: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def train_rows(self) -> tuple[int, ...]:
        """Positions in train that share a picture or a prompt with evaluation: leave these out to mend it."""
        shared = [*self.pictures.values(), *self.prompts.values()]
        return tuple(sorted({i for rows, _ in shared for i in rows}))

    def summary(self) -> str:
        """Three lines for a person."""
        lines = []
        for name in ("pictures", "prompts", "questions"):
            shared = getattr(self, name)
            train = sum(len(rows) for rows, _ in shared.values())
            evaluation = sum(len(rows) for _, rows in shared.values())
            lines.append(f"{name} in both splits: {len(shared):,} ({train:,} training, {evaluation:,} evaluation rows)")
        return "\n".join(lines)


def leakage(train: Iterable[Record], evaluation: Iterable[Record]) -> Leakage:
    """What the two sets share. Questions alone may repeat on purpose, where the picture decides the harm."""
    first, second = list(map(_prompt, train)), list(map(_prompt, evaluation))
    return Leakage(
        pictures=_shared([[x.sha256 for x in p.images] for p in first], [[x.sha256 for x in p.images] for p in second]),
        questions=_shared([[_plain(p.text)] for p in first], [[_plain(p.text)] for p in second]),
        prompts=_shared([[p.id] for p in first], [[p.id] for p in second]),
    )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """How many pairs, of what, and whether each preference goes with its rates.

    safer, more_helpful: counts of pairs where the preferred response has the higher rate ("agrees"), an equal one
    ("tied", the preference was forced), a lower one ("contradicts"), or where a rate is missing ("ungraded").
    """

    pairs: int
    prompts: int
    pictures: int
    safer: Mapping[str, int]
    more_helpful: Mapping[str, int]
    safe_responses: int
    harmless_rates: Mapping[int, int]
    categories: Mapping[str, int]

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.pairs:,} pairs, {self.prompts:,} prompts, {self.pictures:,} pictures"]
        for name, counts in (("safer, by harmless rate", self.safer), ("more helpful, by rate", self.more_helpful)):
            lines.append(f"{name}: " + ", ".join(f"{k} {n:,}" for k, n in counts.items()))
        lines.append(f"safe responses: {self.safe_responses:,} of {2 * self.pairs:,}")
        return "\n".join(lines)


def audit(comparisons: Iterable[Comparison]) -> Audit:
    """Count what a set of pairs holds. Reads every picture's hash, decodes none."""
    pairs = list(comparisons)
    responses = [r for pair in pairs for r in pair.responses]
    safer, helpful = Counter[str](), Counter[str]()
    for pair in pairs:
        first, second = pair.responses
        safer[_agreement(first.harmless_rate, second.harmless_rate, pair.safer)] += 1
        helpful[_agreement(first.helpful_rate, second.helpful_rate, pair.more_helpful)] += 1
    return Audit(
        pairs=len(pairs),
        prompts=len({pair.prompt.id for pair in pairs}),
        pictures=len({picture.sha256 for pair in pairs for picture in pair.prompt.images}),
        safer=dict(safer),
        more_helpful=dict(helpful),
        safe_responses=sum(r.safe for r in responses),
        harmless_rates=dict(sorted(Counter(r.harmless_rate for r in responses if r.harmless_rate is not None).items())),
        categories=dict(Counter(_kind(pair.prompt) for pair in pairs).most_common()),
    )


def _agreement(first: int | None, second: int | None, preferred: int) -> str:
    if first is None or second is None:
        return "ungraded"
    if first == second:
        return "tied"
    return "agrees" if (second > first) == (preferred == 1) else "contradicts"


def _kind(prompt: Prompt) -> str:
    """The category; without one, `benign` where the prompt is known to be harmless, else `unknown`."""
    return prompt.category or ("benign" if prompt.harmful is False else "unknown")


def _prompt(record: Record) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _shared(train: list[list[str]], evaluation: list[list[str]]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    at_train, at_evaluation = _positions(train), _positions(evaluation)
    return {key: (tuple(at_train[key]), tuple(at_evaluation[key])) for key in at_train if key in at_evaluation}


def _positions(keys: list[list[str]]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for i, of_row in enumerate(keys):
        for key in dict.fromkeys(of_row):
            positions.setdefault(key, []).append(i)
    return positions


def check_split(source: str, split: str, columns: str | None = None) -> tuple[LoadReport | None, SourceError | None]:
    """The report of a split, or why it cannot be used: one split's fault does not hide the others."""
    try:
        return load_comparisons(source, split, columns=columns).report, None
    except NoUsableRow as error:
        return error.report, SourceError(f"{source} [{split}]: no usable row")
    except SourceError as error:
        return None, error
