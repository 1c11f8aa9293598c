"""Files of rows. Text stays in memory as arrow; pictures stay in the file and are read when asked, a row group at once."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    columns: Sequence[str]

    def __len__(self) -> int: ...

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
    """A parquet file; `image_column` is left in the file."""

    def __init__(self, path: Path, image_column: str | None) -> None:
        self.path = str(path)
        file = _parquet(self.path)
        self.columns = file.schema_arrow.names
        self.image_column = image_column if image_column in self.columns else None
        self._groups = [0]
        for g in range(file.metadata.num_row_groups):
            self._groups.append(self._groups[-1] + file.metadata.row_group(g).num_rows)
        self._table = file.read(columns=[c for c in self.columns if c != self.image_column])

    def __len__(self) -> int:
        return self._groups[-1]

    def row(self, i: int) -> dict[str, Any]:
        return {name: column[i].as_py() for name, column in zip(self._table.column_names, self._table.columns)}

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start, end in zip(self._groups, self._groups[1:]):
            yield start, self._table.slice(start, end - start).to_pylist()

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        if self.image_column is None:
            return ()
        group = next(g for g, end in enumerate(self._groups[1:]) if i < end)
        cell = _Cell(self.path, group, self.image_column, i - self._groups[group])
        where = f"{self.path} row {i}"
        return tuple(
            Picture(_Image(cell, k), where=where, limits=limits) for k in range(_count(cell.value(), where))
        )


class JsonlPart:
    """A jsonl file; each line names its pictures relative to the file's folder."""

    def __init__(self, path: Path, image_column: str | None) -> None:
        self.path = str(path)
        self.image_column = image_column
        with open(path, encoding="utf-8") as lines:
            self._rows = [_json_row(line) for line in lines]
        self.columns = sorted({name for row in self._rows for name in row if name})

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> dict[str, Any]:
        return {name: value for name, value in self._rows[i].items() if name not in (self.image_column, "images")}

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(0, len(self), _CHUNK):
            yield start, [self.row(i) for i in range(start, min(start + _CHUNK, len(self)))]

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        row = self._rows[i]
        names = row.get("images", row.get(self.image_column or ""))
        if names is None:
            return ()
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ImageError(f"{self.path} row {i}: a picture is given as {names!r}, not as a file name or a list of them")
        folder = Path(self.path).parent
        try:
            return tuple(picture_below(folder, name, limits=limits) for name in names)
        except ImageError as error:
            raise ImageError(f"{self.path} row {i}: {error}") from error


def open_part(path: Path, image_column: str | None) -> Part:
    """A file of rows, by its suffix. Raises SourceError for another kind of file."""
    if path.suffix == ".parquet":
        return ParquetPart(path, image_column)
    if path.suffix == ".jsonl":
        return JsonlPart(path, image_column)
    raise SourceError(f"{path}: neither a .parquet nor a .jsonl file")


def columns_of(path: Path) -> list[str]:
    """Column names, without reading the rows of a parquet file."""
    return list(_parquet(str(path)).schema_arrow.names if path.suffix == ".parquet" else open_part(path, None).columns)


def _json_row(line: str) -> dict[str, Any]:
    if not line.strip():
        return {"": "the line is blank"}
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {"": f"the line is not JSON: {error}"}
    return row if isinstance(row, dict) else {"": "the line is not a JSON object"}


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: not a parquet file, or cut short ({error}); fetch it again") from error


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

    def read(self) -> bytes:
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
                self._groups[key] = _parquet(path).read_row_group(group, columns=[column]).column(0)
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


_CACHE = _GroupCache()
