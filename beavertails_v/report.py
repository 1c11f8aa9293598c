"""What loading left out, and why: nothing disappears silently."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Why a row may be left out. The first three can be kept on request; the others leave nothing usable.
KEEPABLE = ("contradictory", "identical", "empty")
REASONS = (*KEEPABLE, "undecodable", "invalid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """One row left out (or kept in spite). row: from 1, as an editor counts the lines of a jsonl file."""

    file: str
    row: int
    reason: str
    detail: str
    split: str = ""

    def __str__(self) -> str:
        return f"{self.place}{self.reason}: {self.why}"

    @property
    def place(self) -> str:
        return f"{self.file} row {self.row}: "

    @property
    def why(self) -> str:
        """The detail without the place, which that of a picture begins with."""
        return self.detail.removeprefix(self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file that rows were read from. rows: how many it holds; bytes: its size when it was read."""

    path: str
    rows: int
    bytes: int


@dataclass(kw_only=True)
class LoadReport:
    """Outcome of loading one split.

    kept: rows in the set. dropped: rows left out. tolerated: rows with a fault that `keep` let in (counted in `kept`).
    revision: hub commit, where the source came from the hub. notes: anything else worth saying.
    unused: columns that are only carried along as meta. files: what was read.
    fingerprint: SHA-256 of the kept rows with all their columns, of their encoded pictures and of how the columns were
    read, in file order; equal data has the same one, wherever it stands.
    """

    source: str
    split: str
    kept: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    tolerated: list[Dropped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    revision: str | None = None
    files: list[DataFile] = field(default_factory=list)
    fingerprint: str = ""
    unused: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return dict(Counter(d.reason for d in self.dropped))

    def summary(self, examples: int = 3) -> str:
        """A few lines for a person: what was kept, what was left out, and the first rows of each reason."""
        lines = [f"{self.source} [{self.split}]: kept {self.kept:,} rows, left out {len(self.dropped):,}"]
        lines += _tally("left out", self.dropped, examples) + _tally("kept in spite", self.tolerated, examples)
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def write(self, path: str | Path) -> None:
        """Every row left out or kept in spite, one JSON object a line."""
        write_reports([self], path)


def write_reports(reports: Iterable[LoadReport], path: str | Path) -> None:
    """The faulty rows of several splits in one file."""
    rows = []
    for report in reports:
        rows += [{"kept": False, **asdict(d)} for d in report.dropped]
        rows += [{"kept": True, **asdict(d)} for d in report.tolerated]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row_digest(row: dict[str, Any], *more: str) -> bytes:
    """SHA-256 of a row's columns and of what else belongs to it, whatever the order of the columns."""
    text = json.dumps([row, *more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def without_place(detail: str, file: str, row: int) -> str:
    """A picture's error without the file and row that it names for where it stands alone: a report has them already."""
    return detail.replace(f"{file} row {row}: ", "")


def _tally(label: str, entries: Iterable[Dropped], examples: int) -> list[str]:
    entries = list(entries)
    lines = []
    for reason, count in Counter(d.reason for d in entries).most_common():
        lines.append(f"  {label}, {reason}: {count:,}")
        lines += [f"    {d.place}{d.why}" for d in entries if d.reason == reason][:examples]
    return lines
