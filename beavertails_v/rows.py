"""One row of a source -> one Comparison or LabelledResponse, by a column map; or the reason why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from beavertails_v.cells import Unreadable
from beavertails_v.errors import UserError
from beavertails_v.images import Picture
from beavertails_v.references import short
from beavertails_v.schema import Comparison, LabelledResponse, Prompt, Response, SchemaError, Severity
from beavertails_v.sources import ColumnMap, canonical_id
from beavertails_v.taxonomy import BENIGN, Taxonomy

Row = Mapping[str, Any]


class RowError(UserError, ValueError):
    """A row cannot become a record. reason: one of report.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def response_faults(response: Response) -> list[tuple[str, str]]:
    """(reason, detail) of every fault that leaves the response usable in principle."""
    return [("empty", "the response is blank")] if not response.text.strip() else []


def comparison_faults(pair: Comparison) -> list[tuple[str, str]]:
    """(reason, detail) of every fault that leaves the pair usable in principle: empty, identical, contradictory."""
    found = [(reason, f"response {k}: {why}") for k in (1, 2) for reason, why in response_faults(pair.responses[k - 1])]
    if pair.responses[0].text == pair.responses[1].text:
        found.append(("identical", "the two responses are the same text"))
    if why := pair.contradiction:
        found.append(("contradictory", why))
    return found


def comparison(row: Row, columns: ColumnMap, images: tuple[Picture, ...]) -> Comparison:
    """Raises RowError where a value is missing, out of range, or contradicts another."""
    try:
        return Comparison(
            prompt=prompt(row, columns, images),
            responses=(response(row, columns, 0), response(row, columns, 1)),
            more_helpful=_choice(row, columns.single["more_helpful"], columns.ids),
            safer=_choice(row, columns.single["safer"], columns.ids),
        )
    except SchemaError as error:
        raise RowError("invalid", str(error)) from error


def labelled_responses(row: Row, columns: ColumnMap, images: tuple[Picture, ...]) -> list[LabelledResponse]:
    """Every response of the row with its prompt. Raises RowError as `comparison` does."""
    try:
        shared = prompt(row, columns, images)
        return [LabelledResponse(prompt=shared, response=response(row, columns, k)) for k in range(columns.responses)]
    except SchemaError as error:
        raise RowError("invalid", str(error)) from error


def prompt(row: Row, columns: ColumnMap, images: tuple[Picture, ...]) -> Prompt:
    """The question with its pictures; unknown columns go to meta, where they are not null."""
    text = _text(row, columns.single["question"])
    if not text.strip():
        raise RowError("empty", f"column {columns.single['question']!r} is blank")
    severity = _whole(row, columns.single.get("question_severity"), 0, 3)
    return Prompt(
        text=text,
        images=images,
        category=_category(row, columns.single.get("category"), columns.taxonomy),
        severity=None if severity is None else Severity(severity),
        meta={name: value for name, value in row.items() if _usable(value) and name not in columns.known},
        benign=row.get(columns.single.get("category", "")) == BENIGN,
    )


def response(row: Row, columns: ColumnMap, k: int) -> Response:
    """The k-th response of the row, from 0."""
    column = {name: value[k] for name, value in columns.columns.items() if isinstance(value, tuple)}
    harmless = _whole(row, column.get("harmless_rate"), -3, 3)
    severity = _whole(row, column.get("severity"), 0, 3)
    if harmless is None and severity:
        harmless = -severity
    safe = _safe(row, column.get("safe"), columns.safe_words)
    if safe is None:
        if harmless is None:
            raise RowError("invalid", f"response {k + 1} has neither a safe label nor a harmless rate")
        safe = harmless >= 0
    source = row.get(column.get("source", ""))
    return Response(
        text=_text(row, column["response"]),
        safe=safe,
        harmless_rate=harmless,
        helpful_rate=_whole(row, column.get("helpful_rate"), 0, 3),
        source=None if source is None else str(source) if _usable(source) else None,
        category=_category(row, column.get("response_category"), columns.taxonomy, blank_is_none=True),
    )


def _usable(value: Any) -> bool:
    """Whether a value that nothing depends on can be carried along: it is there, and text in it is whole."""
    if isinstance(value, str):
        return not _halved(value)
    return value is not None and not isinstance(value, Unreadable)


def _halved(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError("empty", f"column {column!r} is missing or null")
    if not isinstance(value, str):
        what = value.why if isinstance(value, Unreadable) else f"not text but {type(value).__name__}"
        raise RowError("invalid", f"column {column!r} is {what}")
    if _halved(value):
        raise RowError("invalid", f"column {column!r} holds half a surrogate pair; repair its encoding")
    return value


def _category(row: Row, column: str | None, taxonomy: str | None, *, blank_is_none: bool = False) -> str | None:
    """The category in a column, None where it is missing or benign. Raises RowError for one of no taxonomy."""
    name = row.get(column) if column else None
    if name is None or name == BENIGN or name != name or (blank_is_none and name == ""):
        return None
    if not isinstance(name, str) or _halved(name):
        raise RowError("invalid", f"column {column!r} is {_shown(name)}, not the name of a category")
    if taxonomy and name not in Taxonomy.load(taxonomy).parents:
        raise RowError("invalid", f"column {column!r}: {Taxonomy.load(taxonomy).unknown(short(name))}")
    return name


def _shown(value: Any) -> str:
    return short(repr(value))


def _choice(row: Row, column: str, ids: tuple[str, ...]) -> int:
    value = row.get(column)
    if canonical_id(value) not in ids:
        raise RowError(
            "invalid", f"column {column!r} is {_shown(value)}, neither {ids[0]} nor {ids[1]} (ties cannot be used)"
        )
    return ids.index(canonical_id(value))


def _whole(row: Row, column: str | None, low: int, high: int) -> int | None:
    value = row.get(column) if column else None
    if value is None or value != value:  # NaN is how a data frame writes a missing number
        return None
    text = canonical_id(value)
    if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]+", text) or not low <= int(text) <= high:
        raise RowError("invalid", f"column {column!r} is {_shown(value)}, not a whole number in {low}..{high}")
    return int(text)


#: Words that mean the same in every data set; a column map may turn them round.
_PLAIN_WORDS = {"true": True, "false": False}


def _safe(row: Row, column: str | None, words: Mapping[str, bool]) -> bool | None:
    value = row.get(column) if column else None
    if value is None or value != value:  # NaN is how a data frame writes a missing value
        return None
    known = words if "true" in words else _PLAIN_WORDS | dict(words)
    word = str(value).strip().lower()
    if word not in known:
        allowed = " nor ".join(repr(word) for word in words)
        raise RowError("invalid", f"column {column!r} is {_shown(value)}, neither {allowed} nor a boolean")
    return known[word]
