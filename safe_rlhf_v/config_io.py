"""Reading settings: one YAML file and `a.b=c` overrides into a pydantic model, with errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)


class SettingsError(ValueError):
    """A setting cannot be used. The message names the file or override, the key, the value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice; plain YAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise SettingsError(f"line {node.start_mark.line + 1}: the key '{key}' stands twice; keep one")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping. Raises SettingsError where it is missing, not YAML or not a mapping."""
    if not path.is_file():
        raise SettingsError(f"{path}: no such settings file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file in UTF-8; give a YAML file of settings") from None
    except (yaml.YAMLError, SettingsError) as error:
        raise SettingsError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: a mapping of sections was expected, not {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in place; c is read as YAML, so `null`, `true`, `[1, 2]` and `3e-5` mean what they mean in a file."""
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise SettingsError(f"override '{override}': write section.key=value, for example reward.learning_rate=1e-5")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[last] = value


def load(model: type[M], path: str | Path | None, overrides: Sequence[str] = ()) -> M:
    """A validated `model` from the file (or its defaults alone) with the overrides on top. Raises SettingsError."""
    tree = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(tree, override)
    return validate(model, tree, path, overrides)


def validate(model: type[M], tree: Mapping[str, Any], path: str | Path | None, overrides: Sequence[str] = ()) -> M:
    """A `model` of the tree; path and overrides: where it came from, for the errors. Raises SettingsError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
    groups: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        groups.setdefault(_field(model, detail), []).append(detail)
    raise SettingsError("\n".join(explain(model, key, group, path, overrides) for key, group in groups.items()))


def _field(model: type[BaseModel], detail: ErrorDetails) -> str:
    """Dotted name of the field an error is about, without the branches of a union that pydantic appends."""
    names = [name for name, _ in walk(model)]
    parts = [str(part) for part in detail["loc"]]
    whole = ".".join(parts)
    return next((name for name in names if whole == name or whole.startswith(name + ".")), whole)


def explain(
    model: type[BaseModel], key: str, details: Sequence[ErrorDetails], path: str | Path | None, overrides: Sequence[str]
) -> str:
    """One line for the errors of one key: where, the key, its value, what is allowed, the nearest key or value."""
    first = details[0]
    where = next((f"override '{o}'" for o in overrides if _related(key, o.partition("=")[0])), str(path or "settings"))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{nearest_key(key, model)}; `safe-rlhf-v settings` lists all keys"
    allowed = " or ".join(d["msg"].removeprefix("Input ").removeprefix("Value error, ") for d in details)
    choices = str(first.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(first["input"]), [c.strip("'") for c in choices], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    value = "" if isinstance(first["input"], Mapping | BaseModel) else f" = {first['input']!r}"
    return f"{where}: {key or 'settings'}{value}: {allowed}{hint}"


def _related(key: str, overridden: str) -> bool:
    return f"{key}.".startswith(f"{overridden}.") or f"{overridden}.".startswith(f"{key}.")


def nearest_key(key: str, model: type[BaseModel]) -> str:
    """`; did you mean 'x'?` for the setting whose last name is closest, those of the same section first; or nothing."""
    section, _, last = key.rpartition(".")
    known = {name for name, _ in walk(model)} | {n.rpartition(".")[0] for n, _ in walk(model)} - {""}

    def score(name: str) -> float:
        parent, _, end = name.rpartition(".")
        return difflib.SequenceMatcher(None, last, end).ratio() + 0.2 * (parent == section)

    best = max(sorted(known), key=score)
    return f"; did you mean '{best}'?" if score(best) >= 0.7 else ""


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field of a settings model as (dotted name, FieldInfo), in the order of the file."""
    for name, info in model.model_fields.items():
        sections = [t for t in (info.annotation, *get_args(info.annotation)) if _is_model(t)]
        if sections:
            yield from walk(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Plain YAML in the order given."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=120)
