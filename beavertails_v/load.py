"""Load preference data: a hub id, a folder laid out like the hub's, or a single parquet or jsonl file."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from beavertails_v import rows
from beavertails_v.cells import Unreadable
from beavertails_v.columns import column_notes, require_numbering, unused
from beavertails_v.images import DEFAULT_LIMITS, ImageError, ImageLimits, Picture
from beavertails_v.locate import locate, require_categories
from beavertails_v.report import KEEPABLE, DataFile, Dropped, LoadReport, row_digest, without_place
from beavertails_v.sets import ComparisonSet, Entry, ResponseSet
from beavertails_v.sources import ColumnMap, SourceError, missing_columns, recognise
from beavertails_v.store import Part, open_part

CheckImages = Literal["all", "header", "none"]
#: From this many rows on, pictures are checked on several threads (Pillow lets go of the interpreter lock).
THREADS_FROM = 2000


def load_comparisons(
    source: str | Path,
    split: str = "train",
    *,
    categories: Collection[str] | None = None,
    revision: str | None = None,
    keep: Collection[str] = (),
    limits: ImageLimits = DEFAULT_LIMITS,
    limit: int | None = None,
    check_images: CheckImages = "all",
    columns: str | Path | None = None,
) -> ComparisonSet:
    """Pairs with two preferences.

    source: a hub id, a folder with data/<category>/<split>.parquet (or itself that `data` folder), a folder with
    <split>.jsonl, or one parquet or jsonl file. A jsonl line has the field names of BeaverTails-V, `image` (or a list
    `images`) naming files relative to the jsonl's folder. revision: hub branch, tag or commit. limit: at most so
    many rows, a sample spread over all files, always the same (what faulty rows it meets are replaced).
    keep: of "contradictory", "identical", "empty" (a blank response), what to let in. check_images: "all" decodes
    every picture once; "header" looks at size and format only, so damage shows when the picture is used; "none" opens
    none, for pictures that are known to be good.
    columns: a column map by name or path, where the columns alone do not tell.

    Raises SourceError (nothing there, other columns, the single-response release), TaxonomyError (unknown category).
    """
    _require_keep(keep)
    loader = _Loader("comparisons", source, split, categories, frozenset(keep), limits, limit, check_images)
    parts, entries, report = loader.load(revision, columns)
    return ComparisonSet(parts, entries, report)


def load_responses(
    source: str | Path,
    split: str = "train",
    *,
    categories: Collection[str] | None = None,
    revision: str | None = None,
    keep: Collection[str] = (),
    limits: ImageLimits = DEFAULT_LIMITS,
    limit: int | None = None,
    check_images: CheckImages = "all",
    columns: str | Path | None = None,
) -> ResponseSet:
    """Single responses with their labels: the single-response release, or pairs unrolled into two rows each.

    Arguments and errors as for `load_comparisons`; the preference columns of pairs are not looked at, and `limit`
    counts responses.
    """
    _require_keep(keep)
    loader = _Loader("responses", source, split, categories, frozenset(keep), limits, limit, check_images)
    parts, entries, report = loader.load(revision, columns)
    return ResponseSet(parts, entries, report)


def _require_keep(keep: Collection[str]) -> None:
    for reason in [keep] if isinstance(keep, str) else keep:
        if isinstance(keep, str) or reason not in KEEPABLE:
            raise SourceError(f"option 'keep': {keep!r} is not a list of {', '.join(KEEPABLE)}")


class NoUsableRow(SourceError):
    """Every row of a split was left out; `report` lists them."""

    def __init__(self, report: LoadReport, total: int) -> None:
        super().__init__(f"{report.source}: no usable row among {total}\n{report.summary()}")
        self.report = report


class _Loader:
    """One pass over a split's files."""

    def __init__(
        self,
        kind: Literal["comparisons", "responses"],
        source: str | Path,
        split: str,
        categories: Collection[str] | None,
        keep: frozenset[str],
        limits: ImageLimits,
        limit: int | None,
        check_images: CheckImages,
    ) -> None:
        if categories is not None:
            require_categories(categories)
        if check_images not in (known := get_args(CheckImages)):
            raise SourceError(f"option 'check_images': {check_images!r} is none of {', '.join(known)}")
        self.kind, self.source, self.split = kind, source, split
        self.categories = None if categories is None else tuple(categories)
        self.keep, self.limits, self.limit, self.check_images = keep, limits, limit, check_images
        self.report = LoadReport(source=str(source), split=split)
        self.parts: list[tuple[Part, ColumnMap]] = []
        self.entries: list[Entry] = []
        self.digests: dict[tuple[int, int], bytes] = {}
        self.looked_at = 0
        self.unreadable: Counter[tuple[str, str]] = Counter()
        self.categories_seen: set[str] = set()

    def load(
        self, revision: str | None, columns: str | Path | None
    ) -> tuple[list[tuple[Part, ColumnMap]], list[Entry], LoadReport]:
        files = locate(self.source, self.split, self.categories, revision)
        self.report.notes += files.notes
        self.report.revision = files.revision
        for path in files.paths:
            part = open_part(path)
            column_map = ColumnMap.load(columns) if columns else recognise(part.columns, part.path)
            self._require_fitting(part, column_map)
            part.set_image_column(column_map.image_column)
            if self.kind == "comparisons":
                require_numbering(part, column_map)
            self.report.notes += column_notes(part, column_map, own=columns is not None)
            self.report.unused = sorted({*self.report.unused, *unused(part.columns, column_map)})
            self.parts.append((part, column_map))
            self.report.files.append(DataFile(path=str(path), rows=len(part), bytes=path.stat().st_size))
        total = sum(len(part) for part, _ in self.parts)
        workers = min(8, os.cpu_count() or 1) if total >= THREADS_FROM else 1
        bar = tqdm(total=total, desc=f"Checking {self.split}", unit="row", delay=2, disable=None)
        with bar, ThreadPoolExecutor(workers) as pool:
            run: Callable[..., Iterable[Any]] = pool.map if workers > 1 else map
            for number, chunk in self._chunks():
                self._take(number, chunk, run)
                self.looked_at += len(chunk)
                bar.update(len(chunk))
        self._finish(total)
        return self.parts, self.entries, self.report

    def _require_fitting(self, part: Part, column_map: ColumnMap) -> None:
        if missing := missing_columns(column_map, part.columns):
            raise SourceError(f"{part.path}: the column map {column_map.name!r} needs {missing}, which are not there")
        if self.kind == "comparisons" and column_map.kind == "responses":
            raise SourceError(
                f"{part.path}: this is {column_map.title}, which holds one labelled response a row and no preference. "
                "Use load_responses for it (guard training), or load saferlhf-v/BeaverTails-V for pairs"
            )
        if self.categories is not None and column_map.single.get("category") not in part.columns:
            raise SourceError(f"{part.path}: option 'categories' cannot be used, the file has no column of categories")

    def _full(self) -> bool:
        return self.limit is not None and len(self.entries) >= self.limit

    def _chunks(self) -> Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]]:
        """(number of the file, rows with their positions): all in order, or as many of the sample as `limit` needs."""
        if self.limit is None:
            for number, (part, _) in enumerate(self.parts):
                yield from ((number, list(enumerate(chunk, start))) for start, chunk in part.chunks())
            return
        order = spread([len(part) for part, _ in self.parts])
        most = max(columns.responses for _, columns in self.parts) if self.kind == "responses" else 1
        while order and not self._full():
            count = -(-(self.limit - len(self.entries)) // most)
            chosen, order = sorted(order[:count]), order[count:]
            for number, positions in itertools.groupby(chosen, key=lambda place: place[0]):
                yield number, [(i, self.parts[number][0].row(i)) for _, i in positions]

    def _take(self, number: int, chunk: list[tuple[int, dict[str, Any]]], run: Any) -> None:
        part, columns = self.parts[number]
        for _, row in chunk:
            bad = [name for name, value in row.items() if isinstance(value, Unreadable) and name not in columns.known]
            self.unreadable.update((part.path, name) for name in bad)
        rows_of = dict(chunk)
        judged = [(i, self._judge(row, columns)) for i, row in chunk]
        wanted = [i for i, verdict in judged if isinstance(verdict, list) and verdict]
        pictures = dict(zip(wanted, run(lambda i: _pictures(part, i, self.limits, self.check_images), wanted)))
        for i, verdict in judged:
            if self._full():
                return
            if verdict is None:
                continue
            if isinstance(verdict, rows.RowError):
                self._drop(part, i, verdict.reason, str(verdict))
            elif isinstance(found := pictures.get(i, ()), ImageError):
                self._drop(part, i, "undecodable", str(found))
            elif self._admit(number, part, i, verdict, found):
                self.digests[number, i] = row_digest(rows_of[i], *(picture.sha256 for picture in found))

    def _judge(self, row: dict[str, Any], columns: ColumnMap) -> Any:
        """Faults per record of the row; a RowError; or None for a row of a category not asked for."""
        if "" in row:
            return rows.RowError("invalid", row[""])
        try:
            category = row.get(columns.single.get("category", ""))
            if self.categories is not None and not (isinstance(category, str) and category in self.categories):
                return None
            self.categories_seen.add(str(category))
            if self.kind == "responses":
                return [rows.response_faults(r.response) for r in rows.labelled_responses(row, columns, ())]
            return [rows.comparison_faults(rows.comparison(row, columns, ()))]
        except rows.RowError as error:
            return error

    def _admit(
        self, number: int, part: Part, i: int, faults: list[list[tuple[str, str]]], pictures: tuple[Picture, ...]
    ) -> bool:
        """Take in each record of the row that may be kept; says whether any was."""
        before = len(self.entries)
        for k, found in enumerate(faults):
            if self._full():
                break
            refused = [fault for fault in found if fault[0] not in self.keep]
            if refused:
                self._drop(part, i, *refused[0])
                continue
            self.report.tolerated += [self._left(part, i, *fault) for fault in found]
            self.entries.append(Entry(number, i, pictures, k))
        return len(self.entries) > before

    def _drop(self, part: Part, i: int, reason: str, detail: str) -> None:
        self.report.dropped.append(self._left(part, i, reason, detail))

    def _left(self, part: Part, i: int, reason: str, detail: str) -> Dropped:
        row = part.number(i)
        detail = without_place(detail, part.path, row)
        return Dropped(file=part.path, row=row, reason=reason, detail=detail, split=self.split)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr([columns for _, columns in self.parts[:1]]).encode())
        for entry in self.entries:
            digest.update(self.digests[entry.part, entry.row] + bytes([entry.k]))
        return digest.hexdigest()

    def _finish(self, total: int) -> None:
        self.report.kept = len(self.entries)
        self.entries.sort(key=lambda entry: (entry.part, entry.row, entry.k))
        self.report.fingerprint = self._fingerprint()
        if left := total - self.looked_at:
            note = f"limit={self.limit}: a fixed sample over all {total:,} rows, {left:,} were not looked at"
            self.report.notes.append(note)
        for (path, column), count in self.unreadable.items():
            self.report.notes.append(f"{path}: {count:,} values of column {column!r} cannot be read and are not used")
        absent = sorted(set(self.categories or ()) - self.categories_seen)
        if absent and not self._full():
            raise SourceError(f"{self.source}: no row of category {', '.join(absent)} in split {self.split!r}")
        if not self.entries and self.limit != 0:
            raise NoUsableRow(self.report, total)


def spread(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Every (file, row) of files of these sizes in a fixed random order, of which any beginning holds the same share of
    each file, give or take a row: files may each hold one category."""
    rng, placed = random.Random("beavertails_v limit"), []
    for number, size in enumerate(sizes):
        rows = rng.sample(range(size), size)
        placed += [((j + rng.random()) / size, number, row) for j, row in enumerate(rows)]
    return [(number, row) for _, number, row in sorted(placed)]


#: (sha256, limits, depth of check) of pictures found good in this process, so that loading again costs no decoding.
_GOOD: set[tuple[str, ImageLimits, str]] = set()


def _pictures(part: Part, i: int, limits: ImageLimits, check: CheckImages) -> tuple[Picture, ...] | ImageError:
    try:
        pictures = part.pictures(i, limits)
        for picture in pictures:
            key = (picture.sha256, limits, check)
            if check != "none" and key not in _GOOD:
                picture.check(full=check == "all")
                _GOOD.add(key)
        return pictures
    except ImageError as error:
        return error
