"""Files of rows. Text is held in memory as arrow; pictures stay in the file and are read when asked, by row group."""

from __future__ import annotations

import gzip
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from beavertails_v.cells import cell_value, column_values, json_row, pictures_in
from beavertails_v.images import ImageError, ImageLimits, Picture, picture_of
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

    def values(self, column: str) -> list[Any]:
        """A column of text or numbers, whole; empty where there is none."""
        ...

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(position of the first row, rows), as many rows at once as are cheap to read."""
        ...

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        """Pictures of row i. Raises ImageError."""
        ...


class ParquetPart:
    """A parquet file; its text is read once, its pictures are left in it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        file = _parquet(self.path)
        self.columns: list[str] = file.schema_arrow.names
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            raise SourceError(f"{path}: the column {twice[0]!r} stands twice; drop or rename one of the two")
        sizes = (file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))
        self._groups = [0, *accumulate(sizes)]
        self._image_columns: list[str] = []
        self._wants_image = False

    def __len__(self) -> int:
        return self._groups[-1]

    def number(self, i: int) -> int:
        return i + 1

    def set_image_column(self, name: str | None) -> None:
        self._wants_image = name is not None
        self._image_columns = [c for c in ("images", name) if name and c in self.columns]

    @cached_property
    def _table(self) -> pa.Table:
        with _naming(self.path):
            return _parquet(self.path).read(columns=[c for c in self.columns if c not in self._image_columns])

    def row(self, i: int) -> dict[str, Any]:
        return {name: cell_value(column[i]) for name, column in zip(self._table.column_names, self._table.columns)}

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        names = self._table.column_names
        for start, end in zip(self._groups, self._groups[1:]):
            columns = [column_values(column) for column in self._table.slice(start, end - start).columns]
            yield start, [dict(zip(names, values)) for values in zip(*columns)]

    def values(self, column: str) -> list[Any]:
        return column_values(self._table.column(column)) if column in self._table.column_names else []

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        where = f"{self.path} row {self.number(i)}"
        if not self._image_columns:
            if self._wants_image:
                raise ImageError(f"{where}: the file has no column of pictures")
            return ()
        group = bisect_right(self._groups, i) - 1
        cells = [_Cell(self.path, group, name, i - self._groups[group]) for name in self._image_columns]
        return _pictures(cells, [cell.value() for cell in cells], where, limits)


class JsonlPart:
    """A jsonl file; each line names its pictures relative to the file's folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        numbered = list(_lines(path))
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

    def values(self, column: str) -> list[Any]:
        return [row.get(column) for row in self._rows]

    def pictures(self, i: int, limits: ImageLimits) -> tuple[Picture, ...]:
        where, row = f"{self.path} row {self.number(i)}", self._rows[i]
        values = [row.get("images"), row.get(self._image_column or "")]
        if values == [None, None]:
            if self._image_column is None:
                return ()
            raise ImageError(
                f'{where}: names no picture; give "{self._image_column}", or "images": [] for a row of text'
            )
        return _pictures([None, None], values, where, limits, Path(self.path).parent)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Raises SourceError where the file's compression is damaged."""
    if path.suffix != ".gz":
        with open(path, "rb") as plain:
            yield from _numbered(plain, path)
        return
    try:
        with gzip.open(path, "rb") as lines:
            yield from _numbered(lines, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path}: not compressed by gzip, cut short or damaged ({error}); fetch it again") from None


def _numbered(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the numbers of their lines; blank lines are no rows."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            _require_text(line, path)
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield number, json_row(line)


#: What a file named .jsonl is by its first bytes.
_OTHER_KINDS = {b"PAR1": "a parquet file", b"\x1f\x8b": "compressed by gzip, a .jsonl.gz file"}


def _require_text(beginning: bytes, path: Path) -> None:
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{path}: the text is UTF-16; save it as UTF-8")
    if beginning.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull` in its repository")
    kind = next((kind for first, kind in _OTHER_KINDS.items() if beginning.startswith(first)), None)
    if path.suffix == ".jsonl" and kind:
        raise SourceError(f"{path}: {kind}, going by its content; name it so")
    if beginning.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        raise SourceError(f"{path}: is a web page, such as a failed download leaves; download the file itself")
    if beginning.startswith(b"[") or beginning.strip() == b"{":
        raise SourceError(f"{path}: a JSON list, or an object over several lines; write one object a line")


def _pictures(
    cells: Sequence[_Cell | None], values: Sequence[Any], where: str, limits: ImageLimits, folder: Path | None = None
) -> tuple[Picture, ...]:
    """The pictures of a row: of the first of its columns that holds any. Raises ImageError where two columns differ."""
    given = [(cell, value) for cell, value in zip(cells, values, strict=True) if value is not None and value != ""]
    filled = [(cell, value) for cell, value in given if value != []] or given
    if not filled:
        raise ImageError(f"{where}: the picture is missing: the cell is null or empty")
    try:
        held = pictures_in(filled[0][1])
        if any(pictures_in(value) != held for _, value in filled[1:]):
            raise ImageError("'images' and the column of one picture hold different ones; keep one of the two")
        found = []
        for k, one in enumerate(held):
            if isinstance(one, str):
                found.append(picture_of(folder or Path(where.rpartition(" row ")[0]).parent, one, limits=limits))
            elif (cell := filled[0][0]) is not None:
                found.append(Picture(_Image(cell, k), where=where, limits=limits))
        return tuple(found)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error


#: Other kinds of file, and how to make one that is read.
_CONVERSIONS = {
    ".csv": "load_dataset('csv', data_files={name!r}, split='train').to_json({own!r})",
    ".tsv": "load_dataset('csv', data_files={name!r}, delimiter='\\t', split='train').to_json({own!r})",
    ".json": "load_dataset('json', data_files={name!r}, split='train').to_json({own!r})",
    ".arrow": "Dataset.from_file({name!r}).to_parquet({train!r})",
    ".tar": "load_dataset('webdataset', data_files={name!r}, split='train').to_parquet({train!r})",
}


def conversion(name: str) -> str | None:
    """One line of Python that makes a file of another kind readable where it lies; None for a kind not known."""
    path = Path(name)  # beside it, where its rows' names of pictures are right: train.csv becomes train.jsonl
    targets = {"own": str(path.with_suffix(".jsonl")), "train": str(path.with_name("train.parquet"))}
    call = _CONVERSIONS.get(path.suffix)
    return call and f"from datasets import Dataset, load_dataset; {call.format(name=name, **targets)}"


def open_part(path: Path) -> Part:
    """A file of rows, by its suffix. Raises SourceError for another kind of file."""
    with _naming(str(path)), open(path, "rb") as file:
        _require_text(file.read(100), path)
    if path.suffix == ".parquet":
        return ParquetPart(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return JsonlPart(path)
    how = conversion(str(path))
    advice = f"; convert it in Python: {how}" if how else ""
    raise SourceError(f"{path}: neither a .parquet nor a .jsonl file{advice}")


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
        return cell_value(_CACHE.group(self.path, self.group, self.column)[self.row])


@dataclass(frozen=True, slots=True)
class _Image:
    """The k-th picture of a cell; `read` gives its encoded bytes."""

    cell: _Cell
    k: int

    def read(self, at_most: int) -> bytes:
        value = self.cell.value()
        value = value[self.k] if isinstance(value, list) else value
        return value["bytes"] if isinstance(value, dict) else value  # type: ignore[no-any-return]


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
