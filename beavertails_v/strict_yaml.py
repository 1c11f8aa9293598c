"""YAML as it is written: YAML 1.2's core rules, and a key given twice is an error.

PyYAML follows YAML 1.1, where `no` is false, `1:30` is 90, `012` is 10, `2024-06-01` is a date and `1e-4` is text, and
keeps the last of two equal keys without a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from beavertails_v.errors import UserError


class YamlError(UserError, ValueError):
    """A text is not YAML that can be used. The message is one line and names the line of the text."""


class Readable(Protocol):
    """A path, or a file of a package."""

    def read_text(self, encoding: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Scalar:
    """A plain scalar that reads as a number or as true or false, and as it was written."""

    text: str
    value: bool | int | float


class StrictLoader(yaml.SafeLoader):
    """Plain scalars by YAML 1.2's core schema; merge keys; no key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a key must be a word, not a list or a mapping")
            name = key.value if key.tag == _MERGE else self.construct_object(key)  # type: ignore[no-untyped-call]
            if name in seen:
                raise _problem(key, f"the key '{key.value}' stands twice; keep one")
            seen.add(name)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


class _WrittenLoader(StrictLoader):
    """The same with a Scalar for every number, true and false; keys are text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep=deep)  # type: ignore[no-untyped-call]
        plain = isinstance(node, yaml.ScalarNode) and isinstance(value, bool | int | float)
        return Scalar(node.value, value) if plain else value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        return {key.text if isinstance(key, Scalar) else key: value for key, value in found.items()}


_MERGE = "tag:yaml.org,2002:merge"
_CORE = {  # at most 400 digits: Python refuses to read numbers of thousands
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


_OTHER_TAGS = ("set", "omap", "pairs", "binary", "timestamp")  # a set has no order, and columns and ids have one


def _refuse_tag(loader: StrictLoader, node: yaml.Node) -> None:
    raise _problem(node, f"the tag '!!{node.tag.rpartition(':')[2]}' is not used here; write a list, a mapping or text")


def _teach_core_schema() -> None:
    for name in _OTHER_TAGS:
        StrictLoader.add_constructor(f"tag:yaml.org,2002:{name}", _refuse_tag)
    for name, (pattern, first) in _CORE.items():
        StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), first)
    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)


_teach_core_schema()


def load_yaml(text: str, *, as_written: bool = False) -> Any:
    """What the text holds. as_written: numbers and truth values as `Scalar`. Raises YamlError."""
    try:
        return yaml.load(text, Loader=_WrittenLoader if as_written else StrictLoader)
    except yaml.YAMLError as error:
        raise YamlError(_one_line(error)) from None
    except RecursionError:
        raise YamlError("nested too deeply to be read") from None


def read_yaml(path: Readable, *, as_written: bool = False) -> Any:
    """`load_yaml` of a file. Raises YamlError, whose message does not name the file, and OSError, which does."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"), as_written=as_written)
    except UnicodeDecodeError:
        raise YamlError("not a text file in UTF-8") from None


def _problem(node: yaml.Node, text: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _one_line(error: yaml.YAMLError) -> str:
    """`line 3, column 5: what is wrong`."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = [str(x) for x in (getattr(error, "context", None), getattr(error, "problem", None)) if x]
    return where + " ".join((", ".join(said) or str(error)).split())
