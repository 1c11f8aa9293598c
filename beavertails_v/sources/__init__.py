"""Data sets as column maps: a data set is a YAML file here, not a class.

A map says which column of the source is which field of ours, how the two responses are numbered, and what marks the
data set out. Files are recognised by their columns, never by their name, since a hub name has changed schema before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

#: Fields a map may name that hold one column, and those that hold one column for each response.
SINGLE_FIELDS = ("question", "images", "category", "question_severity", "more_helpful", "safer")
PER_RESPONSE_FIELDS = ("response", "source", "safe", "harmless_rate", "severity", "helpful_rate", "response_category")


class SourceError(ValueError):
    """A source or a column map cannot be used. The message names the file or the field and what to do."""


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Which column is which field.

    kind: "comparisons" (two responses, two preferences) or "responses" (one labelled response).
    columns: field of SINGLE_FIELDS -> column; field of PER_RESPONSE_FIELDS -> one column per response.
    required: columns a file must have to be this data set. ids: how the first and second response are numbered.
    safe_words: what stands for safe and unsafe, beside booleans. taxonomy: whose categories rows must have, or None.
    """

    name: str
    title: str
    kind: Literal["comparisons", "responses"]
    columns: Mapping[str, Any]
    required: tuple[str, ...]
    ids: tuple[str, ...] = ()
    safe_words: Mapping[str, bool] = field(default_factory=dict)
    taxonomy: str | None = None
    hub: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.columns.items():
            if name not in SINGLE_FIELDS + PER_RESPONSE_FIELDS:
                raise SourceError(f"column map {self.name!r}: unknown field {name!r} under 'columns'")
            if name in PER_RESPONSE_FIELDS and len(value) != self.responses:
                raise SourceError(f"column map {self.name!r}: field {name!r} needs {self.responses} column(s)")
        if self.kind == "comparisons" and len(self.ids) != 2:
            raise SourceError(f"column map {self.name!r}: field 'ids' needs two entries, such as ['1', '2']")

    @property
    def responses(self) -> int:
        """Responses in a row."""
        return 2 if self.kind == "comparisons" else 1

    @cached_property
    def known(self) -> frozenset[str]:
        """Every column the map names; all others are carried along as meta."""
        values = self.columns.values()
        return frozenset(column for value in values for column in ([value] if isinstance(value, str) else value))

    @property
    def image_column(self) -> str | None:
        return self.columns.get("images")

    @classmethod
    def load(cls, name: str | Path) -> ColumnMap:
        """A map shipped here, by name, or a YAML file of the same form, by path."""
        return _load(str(name))


@lru_cache
def _load(name: str) -> ColumnMap:
    folder = resources.files("beavertails_v.sources")
    if name.endswith((".yaml", ".yml")):
        text = Path(name).read_text(encoding="utf-8")
    elif name in shipped():
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise SourceError(f"no column map {name!r}; there is {', '.join(shipped())}, or give the path of a .yaml file")
    data = yaml.safe_load(text)
    for key in ("required", "ids", "hub"):
        data[key] = tuple(data.get(key) or ())
    try:
        return ColumnMap(**data)
    except TypeError as error:
        raise SourceError(f"column map {name!r}: {error}") from error


def shipped() -> list[str]:
    """Names of the maps that come with the package."""
    folder = resources.files("beavertails_v.sources")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def recognise(columns: Iterable[str], where: str) -> ColumnMap:
    """The shipped map whose required columns are all there. Raises SourceError saying what the columns look like."""
    have = set(columns)
    fitting = [m for m in map(ColumnMap.load, shipped()) if have.issuperset(m.required)]
    if fitting:
        return max(fitting, key=lambda m: len(m.required))
    raise SourceError(f"{where}: {_why_unknown(have)}")


def missing_columns(column_map: ColumnMap, columns: Iterable[str]) -> str:
    """The required columns that are not there, as a list in words; empty where all are."""
    have = set(columns)
    return ", ".join(c for c in column_map.required if c not in have)


def _why_unknown(have: set[str]) -> str:
    listed = ", ".join(sorted(have)) or "none"
    if {"chosen", "rejected"} <= have:
        return (
            f"this holds one merged preference (columns {listed}); constrained alignment needs two, "
            "which response is more helpful and which is safer"
        )
    maps = [ColumnMap.load(name) for name in shipped()]
    nearest = max(maps, key=lambda m: len(have & set(m.required)))
    return (
        f"the columns ({listed}) are those of no data set known here; the nearest is {nearest.title}, which also has "
        f"{missing_columns(nearest, have)}. Rename the columns, or pass columns=<your column map .yaml>"
    )
