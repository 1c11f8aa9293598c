"""What loading gives: sequences of records that are built from their row when asked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self, TypeVar, overload

from beavertails_v import rows
from beavertails_v.images import Picture
from beavertails_v.report import LoadReport
from beavertails_v.schema import Comparison, LabelledResponse, Prompt
from beavertails_v.sources import ColumnMap
from beavertails_v.store import Part

T = TypeVar("T", Comparison, LabelledResponse)


class Entry(NamedTuple):
    """Where a record stands. k: which response of the row, for single responses."""

    part: int
    row: int
    pictures: tuple[Picture, ...]
    k: int = 0


class _RecordSet(Sequence[T]):
    """Records built from their row when asked; what is held is the text columns and where each picture stands."""

    def __init__(self, parts: Sequence[tuple[Part, ColumnMap]], entries: Sequence[Entry], report: LoadReport) -> None:
        self._parts = parts
        self._entries = entries
        self.report = report

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._build(self._entries[index])

    def __iter__(self) -> Iterator[T]:
        return (self._build(entry) for entry in self._entries)

    def select(self, indices: Iterable[int]) -> Self:
        """The records at these positions, in this order, repeats allowed; the report stays that of the whole."""
        return type(self)(self._parts, [self._entries[i] for i in indices], self.report)

    def prompts(self) -> list[Prompt]:
        """Every prompt once, by id, in order of first appearance."""
        unique: dict[str, Prompt] = {}
        for entry in self._entries:
            part, columns = self._parts[entry.part]
            prompt = rows.prompt(part.row(entry.row), columns, entry.pictures)
            unique.setdefault(prompt.id, prompt)
        return list(unique.values())

    def origin(self, index: int) -> tuple[str, int]:
        """(file, row from 1) a record came from; in a jsonl file the row is the line an editor shows."""
        entry = self._entries[index]
        part = self._parts[entry.part][0]
        return part.path, part.number(entry.row)

    @abstractmethod
    def _build(self, entry: Entry) -> T: ...


class ComparisonSet(_RecordSet[Comparison]):
    """Comparisons of one split, in file order. `.report` says what was left out."""

    def _build(self, entry: Entry) -> Comparison:
        part, columns = self._parts[entry.part]
        return rows.comparison(part.row(entry.row), columns, entry.pictures)


class ResponseSet(_RecordSet[LabelledResponse]):
    """Single labelled responses of one split, in file order. `.report` says what was left out."""

    def _build(self, entry: Entry) -> LabelledResponse:
        part, columns = self._parts[entry.part]
        row = part.row(entry.row)
        return LabelledResponse(
            prompt=rows.prompt(row, columns, entry.pictures), response=rows.response(row, columns, entry.k)
        )
