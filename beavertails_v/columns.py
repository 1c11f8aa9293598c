"""What a file's columns say before any row is read: how responses are numbered, and which columns are not used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from beavertails_v.sources import ColumnMap, SourceError, canonical_id, nearest
from beavertails_v.store import Part

#: Columns of known releases that are carried along on purpose.
_EXTRAS = frozenset({"image", "images", "image_severity", "picture_world"})
_ALIKE = 0.82
#: From so many ids on, a column alone shows how it is numbered; below, both columns of the file together.
_ENOUGH = 8


def require_numbering(part: Part, columns: ColumnMap) -> None:
    """Raise SourceError where a column numbers the responses otherwise than the map: labels are never read by guess.

    Each column of ids is looked at whole, so neither a null nor a limit hides the numbering.
    """
    if columns.kind != "comparisons" or not all(text.removeprefix("-").isdecimal() for text in columns.ids):
        return
    low, high = sorted(int(text) for text in columns.ids)
    names = [str(columns.columns[name]) for name in ("more_helpful", "safer")]
    ids = {name: [canonical_id(value) for value in part.values(name)] for name in names}
    both = [text for values in ids.values() for text in values]
    for name, values in ids.items():
        _require_numbers(part, columns, name, low, high, set(values) if len(values) >= _ENOUGH else set(both))
        _require_numbers(part, columns, name, low, high, set(both))


def _require_numbers(part: Part, columns: ColumnMap, name: str, low: int, high: int, seen: set[str]) -> None:
    """Numbered one lower: the lower number is there and the higher is not; one higher: the other way round."""
    for start, there, absent in ((low - 1, low - 1, high), (low + 1, high + 1, low)):
        if high == low + 1 and start >= 0 and str(there) in seen and str(absent) not in seen:
            raise SourceError(
                f"{part.path}: column {name!r}: the responses are numbered {start} and {start + 1}, where "
                f"{columns.title} has {columns.ids[0]} and {columns.ids[1]}, so that a {max(start, low)} would be "
                f"misread. Renumber them, or pass columns=<column map with ids: ['{start}', '{start + 1}']>"
            )


def column_notes(part: Part, columns: ColumnMap, *, own: bool) -> list[str]:
    """Columns that look misspelt; and, of a map of the user's (`own`), those that the file lacks."""
    notes = []
    absent = _absent(part, columns) if own else []
    for name in unused(part.columns, columns):
        near = difflib.get_close_matches(name, sorted(columns.known - set(absent)), n=1, cutoff=_ALIKE)
        if near and not _together(part, name, near[0]):
            notes.append(f"{part.path}: column {name!r} is not used; did you mean {near[0]!r}?")
    words = "the column map names {!r}, which is not there{}"
    return notes + [f"{part.path}: " + words.format(name, nearest(name, part.columns)) for name in absent]


def _absent(part: Part, columns: ColumnMap) -> list[str]:
    """Columns of the map that the file lacks; `images` may take the place of that of one picture."""
    stands_in = {columns.image_column} if "images" in part.columns else set()
    return sorted(columns.known - set(part.columns) - stands_in)


def unused(have: Iterable[str], columns: ColumnMap) -> list[str]:
    """Columns that are carried along as meta, those of known releases aside."""
    return sorted(set(have) - columns.known - _EXTRAS)


def _together(part: Part, first: str, second: str) -> bool:
    """Whether some row has a value in both: then neither is a misspelling of the other."""
    pairs: Iterable[tuple[Any, Any]] = zip(part.values(first), part.values(second), strict=False)
    return any(a is not None and b is not None for a, b in pairs)
