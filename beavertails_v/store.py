"""Files of rows. Text is held in memory as arrow; pictures stay in the file and are read when asked, by row group."""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from beavertails_v.images import ImageError, ImageLimits, Picture, picture_below
from beavertails_v.sources import SourceError

#: Bytes of encoded pictures a process keeps at hand for repeated reads.
CACHE_BYTES = 256 * 1024 * 1024
_CHUNK = 1000


class Part(Protocol):
    """One file of rows."""

    path: str
    columns: list[str]

    def __len__(self) -> int: ...

    def number(self, i: int) -> int:
        """What a person calls row i: counted from 1; in a jsonl file, the line an editor shows."""
        ...

    def set_image_column(self, name: str | None) -> None:
        """Say which column holds the pictures; None for rows of text. Call it before anything is read."""
        ...

    def row(self, i: int) -> dict[str, Any]:
        """All columns but the pictures'. A broken row gives {"": why}."""
        ...

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(position of the first row, rows), as many rows at once as are cheap to read."""
        ...

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        """Pictures of row i. Raises ImageError."""
        ...


class ParquetPart:
    """A parquet file; the pictures are left in it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        file = _parquet(self.path)
        self.columns: list[str] = file.schema_arrow.names
        sizes = (file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))
        self._groups = [0, *accumulate(sizes)]
        self._image_column: str | None = None
        self._wants_image = False

    def __len__(self) -> int:
        return self._groups[-1]

    def number(self, i: int) -> int:
        return i + 1

    def set_image_column(self, name: str | None) -> None:
        self._wants_image = name is not None
        self._image_column = next((c for c in (name, "images") if c in self.columns), None)

    @cached_property
    def _table(self) -> pa.Table:
        with _naming(self.path):
            return _parquet(self.path).read(columns=[c for c in self.columns if c != self._image_column])

    def row(self, i: int) -> dict[str, Any]:
        return {name: column[i].as_py() for name, column in zip(self._table.column_names, self._table.columns)}

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start, end in zip(self._groups, self._groups[1:]):
            yield start, self._table.slice(start, end - start).to_pylist()

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        where = f"{self.path} row {self.number(i)}"
        if self._image_column is None:
            if self._wants_image:
                raise ImageError(f"{where}: the file has no column of pictures")
            return ()
        group = bisect_right(self._groups, i) - 1
        cell = _Cell(self.path, group, self._image_column, i - self._groups[group])
        return tuple(Picture(_Image(cell, k), where=where, limits=limits) for k in range(_count(cell.value(), where)))


class JsonlPart:
    """A jsonl file; each line names its pictures relative to the file's folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        with open(path, "rb") as lines:
            numbered = [(number, _json_row(line)) for number, line in enumerate(lines, 1) if line.strip()]
        self._numbers, self._rows = [number for number, _ in numbered], [row for _, row in numbered]
        if all("" in row for row in self._rows):
            first = f"row {self._numbers[0]}: {self._rows[0]['']}" if self._rows else ""
            raise SourceError(f"{path}: " + (f"no line is JSON of a row; {first}" if first else "the file is empty"))
        self.columns = sorted({name for row in self._rows for name in row if name})
        self._image_column: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, i: int) -> int:
        return self._numbers[i]

    def set_image_column(self, name: str | None) -> None:
        self._image_column = name

    def row(self, i: int) -> dict[str, Any]:
        return {name: value for name, value in self._rows[i].items() if name not in (self._image_column, "images")}

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(0, len(self), _CHUNK):
            yield start, [self.row(i) for i in range(start, min(start + _CHUNK, len(self)))]

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        where, row = f"{self.path} row {self.number(i)}", self._rows[i]
        names = row.get("images", row.get(self._image_column or ""))
        if names is None:
            if self._image_column is None:
                return ()
            raise ImageError(
                f'{where}: names no picture; give "{self._image_column}", or "images": [] for a row of text'
            )
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ImageError(f"{where}: {names!r} is neither a file name nor a list of them")
        try:
            return tuple(picture_below(Path(self.path).parent, name, limits=limits) for name in names)
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from error


def open_part(path: Path) -> Part:
    """A file of rows, by its suffix. Raises SourceError for another kind of file."""
    if path.suffix == ".parquet":
        return ParquetPart(path)
    if path.suffix == ".jsonl":
        return JsonlPart(path)
    raise SourceError(f"{path}: neither a .parquet nor a .jsonl file")


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"": f"the line is not JSON: {error}"}
    return row if isinstance(row, dict) else {"": "the line is not a JSON object"}


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Says which file arrow could not read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not a parquet file, or damaged ({error}); fetch it again") from error


def _parquet(path: str) -> pq.ParquetFile:
    with _naming(path):
        return pq.ParquetFile(path, memory_map=True)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One cell of the picture column."""

    path: str
    group: int
    column: str
    row: int

    def value(self) -> Any:
        return _CACHE.group(self.path, self.group, self.column)[self.row].as_py()


@dataclass(frozen=True, slots=True)
class _Image:
    """The k-th picture of a cell; `read` gives its encoded bytes."""

    cell: _Cell
    k: int

    def read(self, at_most: int) -> bytes:
        value = self.cell.value()
        value = value[self.k] if isinstance(value, list) else value
        return value["bytes"] if isinstance(value, dict) else value  # type: ignore[no-any-return]


def _count(value: Any, where: str) -> int:
    """How many pictures a cell holds. Raises ImageError unless each comes with its bytes."""
    values = value if isinstance(value, list) else [value]
    for one in values:
        data = one.get("bytes") if isinstance(one, dict) else one
        if not isinstance(data, bytes):
            raise ImageError(f"{where}: the picture is missing: the cell holds no bytes; embed the file in the parquet")
    return len(values)


class _GroupCache:
    """The last row groups of pictures read, up to CACHE_BYTES; safe between threads."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Any, ...], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def group(self, path: str, group: int, column: str) -> pa.ChunkedArray:
        with self._lock:
            key = (path, os.stat(path).st_mtime_ns, group, column)
            if key not in self._groups:
                with _naming(path):
                    self._groups[key] = _parquet(path).read_row_group(group, columns=[column]).column(0)
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


_CACHE = _GroupCache()
