"""Data sets as column maps: a data set is a YAML file here, not a class.

A map says which column of the source is which field of ours, how the two responses are numbered, and what marks the
data set out. Files are recognised by their columns, never by their name, since a hub name has changed schema before.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError, model_validator

from beavertails_v.errors import UserError
from beavertails_v.strict_yaml import Scalar, YamlError, load_yaml
from beavertails_v.taxonomy import Taxonomy

#: Fields a map may name that hold one column, and those that hold one column for each response.
SINGLE_FIELDS = ("question", "images", "category", "question_severity", "more_helpful", "safer")
PER_RESPONSE_FIELDS = ("response", "source", "safe", "harmless_rate", "severity", "helpful_rate", "response_category")
#: Fields whose two columns may be the same one: a label of the whole row.
_SHARED = ("source", "response_category")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class SourceError(UserError, ValueError):
    """A source or a column map cannot be used. The message names the file or the field and what to do."""


def canonical_id(value: Any) -> str:
    """An id as written in a column map: 1, 1.0, '1', '1.0' and ' 1 ' are all '1'."""
    text = str(value).strip()
    if isinstance(value, bool) or text in ("True", "False"):
        return text.lower()
    whole, point, zeros = text.partition(".")
    return whole if point and not zeros.strip("0") and whole.removeprefix("-").isdecimal() else text


def _text(value: Any) -> Any:
    """A scalar as it was written: ids and words are text, whatever YAML would make of them."""
    value = value.text if isinstance(value, Scalar) else value
    return str(value) if isinstance(value, bool | int | float) else value


def _truth(value: Any) -> Any:
    value = value.value if isinstance(value, Scalar) else value
    known = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return known


Text = Annotated[str, BeforeValidator(_text), StringConstraints(min_length=1)]


class ColumnMap(BaseModel):
    """Which column is which field.

    kind: "comparisons" (two responses, two preferences) or "responses" (one labelled response).
    columns: field of SINGLE_FIELDS -> column; field of PER_RESPONSE_FIELDS -> one column per response.
    required: columns a file must have to be this data set; by default question, responses and preferences.
    ids: how the first and second response are numbered. safe_words: what stands for safe and unsafe, beside booleans.
    taxonomy: whose categories rows must have, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    title: Text = "a set of your own"
    kind: Literal["comparisons", "responses"]
    columns: dict[str, Text | tuple[Text, ...]]
    required: tuple[Text, ...] = ()
    ids: tuple[Annotated[Text, BeforeValidator(lambda x: canonical_id(_text(x)))], ...] = ()
    safe_words: dict[Text, Annotated[bool, BeforeValidator(_truth)]] = {}
    taxonomy: Text | None = None
    hub: tuple[Text, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Lower-case words, and the columns without which no row can be read as those required."""
        if isinstance(data, dict) and isinstance(words := data.get("safe_words"), Mapping):
            if None in words:
                raise ValueError("field 'safe_words': a word is null; an empty cell is no label, a text goes in quotes")
            lower = [str(_text(word)).strip().lower() for word in words]
            if twice := [word for word in lower if lower.count(word) > 1]:
                raise ValueError(f"field 'safe_words': {twice[0]!r} stands twice; capitals do not count")
            data = data | {"safe_words": dict(zip(lower, words.values(), strict=True))}
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, value in self.columns.items():
            if name not in SINGLE_FIELDS + PER_RESPONSE_FIELDS:
                near = nearest(name, SINGLE_FIELDS + PER_RESPONSE_FIELDS)
                raise ValueError(f"unknown field {name!r} under 'columns'{near}")
            if name in SINGLE_FIELDS and not isinstance(value, str):
                raise ValueError(f"field {name!r} under 'columns' is one column, not a list")
            if name in PER_RESPONSE_FIELDS and (isinstance(value, str) or len(value) != self.responses):
                wanted = "a list of two columns, [first, second]" if self.responses == 2 else "a list of one column"
                raise ValueError(f"field {name!r} under 'columns' is {value!r}; it needs {wanted}")
        needed = ("question", "response") + (("more_helpful", "safer") if self.kind == "comparisons" else ())
        if missing := [name for name in needed if name not in self.columns]:
            raise ValueError(f"field {missing[0]!r} is missing under 'columns'; needed are {', '.join(needed)}")
        if not {"safe", "harmless_rate", "severity"} & set(self.columns):
            raise ValueError("under 'columns' one of safe, harmless_rate, severity is needed: which response is safe")
        self._require_distinct()
        return self

    def _require_distinct(self) -> None:
        named = [c for name, value in self.columns.items() if name not in _SHARED for c in _listed(value)]
        if twice := sorted({column for column in named if named.count(column) > 1}):
            raise ValueError(f"column {twice[0]!r} stands twice under 'columns'; each label has a column of its own")
        if self.kind == "comparisons" and len(set(self.ids)) != 2:
            raise ValueError("field 'ids' needs two different entries, first and second response, such as ['1', '2']")
        if self.safe_words and set(self.safe_words.values()) != {True, False}:
            raise ValueError("field 'safe_words' needs a word that is true (safe) and one that is false (unsafe)")
        if len({"true", "false"} & set(self.safe_words)) == 1:
            raise ValueError("field 'safe_words' gives one of 'true' and 'false'; give both or neither")

    @property
    def responses(self) -> int:
        """Responses in a row."""
        return 2 if self.kind == "comparisons" else 1

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""
        fields = [self.columns[n] for n in ("question", "response", "more_helpful", "safer") if n in self.columns]
        return self.required or tuple(column for value in fields for column in _listed(value))

    @cached_property
    def known(self) -> frozenset[str]:
        """Every column the map names; all others are carried along as meta."""
        return frozenset(column for value in self.columns.values() for column in _listed(value))

    @cached_property
    def single(self) -> dict[str, str]:
        """Field -> column, for the fields that hold one column."""
        return {name: value for name, value in self.columns.items() if isinstance(value, str)}

    @property
    def image_column(self) -> str | None:
        return self.single.get("images")

    @classmethod
    def load(cls, name: str | Path) -> ColumnMap:
        """A map shipped here, by name, or a YAML file of the same form, by path. Raises SourceError."""
        return _shipped(str(name)) if str(name) in shipped() else _from_file(str(name))


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@lru_cache
def _shipped(name: str) -> ColumnMap:
    text = (resources.files("beavertails_v.sources") / f"{name}.yaml").read_text(encoding="utf-8")
    return _read_map(name, text)


def _from_file(name: str) -> ColumnMap:
    if not name.endswith((".yaml", ".yml")):
        raise SourceError(f"no column map {name!r}; there is {', '.join(shipped())}, or give the path of a .yaml file")
    if not Path(name).is_file():
        raise SourceError(f"column map {name!r}: no such file")
    try:
        return _read_map(name, Path(name).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise SourceError(f"column map {name!r}: not a text file in UTF-8") from None


def _read_map(name: str, text: str) -> ColumnMap:
    try:
        data = load_yaml(text, as_written=True)
    except YamlError as error:
        raise SourceError(f"column map {name!r}: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"column map {name!r}: {'the file is empty' if data is None else 'not a mapping'}; {_FORM}")
    try:
        column_map = ColumnMap.model_validate(data)
    except ValidationError as error:
        raise SourceError(f"column map {name!r}: {'; '.join(map(_in_words, error.errors()))}") from error
    if column_map.taxonomy:
        Taxonomy.load(column_map.taxonomy)
    return column_map


_FORM = "it needs name, kind, columns and, for pairs, ids (docs/data.md, Other columns)"


def _in_words(error: Any) -> str:
    """One fault of a map: the field, what stands there, what is allowed."""
    where = ".".join(str(part) for part in error["loc"] if not re.search(r"^str$|[\[(]", str(part)))  # no types
    if error["type"] == "value_error" and not error["loc"]:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {where!r}{nearest(where, ColumnMap.model_fields)}"
    if error["type"] == "missing":
        return f"field {where!r} is missing; {_FORM}"
    value = _text(error["input"])
    return f"field {where!r} is {str(value)[:60]!r}: {error['msg'].removeprefix('Value error, ')}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shipped() -> list[str]:
    """Names of the maps that come with the package."""
    folder = resources.files("beavertails_v.sources")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def recognise(columns: Iterable[str], where: str) -> ColumnMap:
    """The shipped map whose required columns are all there. Raises SourceError saying what the columns look like."""
    have = set(columns)
    fitting = [m for m in map(ColumnMap.load, shipped()) if have.issuperset(m.needed)]
    if fitting:
        return max(fitting, key=lambda m: len(m.needed))
    raise SourceError(f"{where}: {_why_unknown(have)}")


def missing_columns(column_map: ColumnMap, columns: Iterable[str]) -> str:
    """The required columns that are not there, as a list in words; empty where all are."""
    have = set(columns)
    return ", ".join(c for c in column_map.needed if c not in have)


def _why_unknown(have: set[str]) -> str:
    listed = ", ".join(sorted(have)) or "none"
    if {"chosen", "rejected"} <= have:
        return (
            f"this holds one merged preference (columns {listed}); constrained alignment needs two, "
            "which response is more helpful and which is safer"
        )
    maps = [ColumnMap.load(name) for name in shipped()]
    closest = max(maps, key=lambda m: len(have & set(m.needed)))
    missing = [c for c in closest.needed if c not in have]
    alike = {column: _spelt_like(column, have - closest.known) for column in missing}
    hints = "".join(f"; is {near[0]!r} meant as {column!r}?" for column, near in alike.items() if near)
    return (
        f"the columns ({listed}) are those of no data set known here; the nearest is {closest.title}, which also has "
        f"{', '.join(missing)}{hints}. Rename the columns, or pass columns=<your column map .yaml>"
    )


def _spelt_like(name: str, names: Iterable[str]) -> list[str]:
    plain = {other.lower().replace(" ", "_").replace("-", "_").strip("_"): other for other in names}
    return [plain[found] for found in difflib.get_close_matches(name, sorted(plain), n=1, cutoff=0.7)]
