"""Values of cells, and what a picture cell holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from beavertails_v.images import ImageError
from beavertails_v.references import short


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that is in the file and cannot be read, such as text that is not UTF-8."""

    why: str

    def __repr__(self) -> str:
        return self.why


def column_values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; one that cannot be read is an Unreadable and spoils no other."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [cell_value(cell) for cell in column]


def cell_value(cell: pa.Scalar) -> Any:
    """The value, or an Unreadable."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return Unreadable(f"not readable ({short(str(error))})")


def pictures_in(value: Any) -> list[Any]:
    """One picture or a list of them as a list of bytes and texts. Raises ImageError for anything else."""
    values = value if isinstance(value, list) else [value]
    return [_picture_in(one) for one in values]


def _picture_in(value: Any) -> bytes | str:
    if isinstance(value, dict):
        held = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if not isinstance(held, bytes | str):
            raise ImageError(f"the picture is missing: a cell with the keys {sorted(map(str, value))} holds no bytes")
        value = held
    if isinstance(value, list | tuple):
        raise ImageError("the picture is given as numbers (pixels); give an encoded file, such as PNG")
    if not isinstance(value, bytes | str):
        what = "is null" if value is None else f"is {short(repr(value))}"
        raise ImageError(f"the picture is missing: the cell {what}, neither a file's bytes nor the name of a file")
    return value


def json_row(line: bytes) -> dict[str, Any]:
    """A line of jsonl; {"": why} where it is no row."""
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        return {"": f"the line is not UTF-8 (byte {line[error.start]:#04x} at {error.start}); save the file as UTF-8"}
    except KeyError as error:
        return {"": f"the key {error.args[0]!r} stands twice; keep one"}
    except (ValueError, RecursionError) as error:
        return {"": f"the line is not JSON: {error}"}
    if not isinstance(row, dict):
        return {"": "the line is not a JSON object"}
    return {"": "a key is the empty text; give the column a name"} if "" in row else row


def _no_key_twice(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found
