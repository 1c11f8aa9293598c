"""Reading settings: one YAML file and `a.b=c` overrides into a pydantic model, with errors that say what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from beavertails_v.errors import UserError
from beavertails_v.strict_yaml import Scalar, YamlError, load_yaml
from beavertails_v.strict_yaml import read_yaml as read_yaml_file

M = TypeVar("M", bound=BaseModel)

#: Characters of a value that an error shows.
SHOWN = 60


class SettingsError(UserError, ValueError):
    """A setting cannot be used. The message names the file or override, the key, the value and what is allowed."""


def read_yaml(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The file's mapping, its values read as the model's settings want them (`settle`).

    Raises SettingsError where it is missing, not YAML or not a mapping.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such settings file")
    try:
        tree = settle(model, read_yaml_file(path, as_written=True))
    except YamlError as error:
        raise SettingsError(f"{path}: {error}") from None
    except RecursionError:
        raise SettingsError(f"{path}: an alias (*name) stands inside what it names") from None
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: a mapping of sections was expected, not {type(tree).__name__}")
    return tree


def settle(wanted: Any, value: Any) -> Any:
    """What a file says, for a setting of type `wanted`: where that is text, numbers and truth values stay as written.

    So `output_dir: 20240601` and `train_split: 0` are text. An empty section is one with its defaults.
    """
    kinds = _kinds(wanted)
    section = next((kind for kind in kinds if _is_model(kind)), None)
    if section is not None and (value is None or isinstance(value, Mapping)):
        if value is None and types.NoneType in kinds:
            return None
        return {key: settle(_field_type(section, key), inner) for key, inner in (value or {}).items()}
    if isinstance(value, Mapping):
        inside = next((get_args(kind)[1] for kind in kinds if get_origin(kind) in (dict, Mapping)), Any)
        return {key: settle(inside, inner) for key, inner in value.items()}
    if isinstance(value, list):
        inside = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), Any)
        return [settle(inside, inner) for inner in value]
    if isinstance(value, Scalar):
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        return value.text if str in kinds or value.text in words else value.value
    return value


def _kinds(wanted: Any) -> tuple[Any, ...]:
    """The alternatives of a type, without their constraints: `Annotated[int, ...] | None` -> (int, NoneType)."""
    if get_origin(wanted) is Annotated:
        return _kinds(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        return tuple(kind for part in get_args(wanted) for kind in _kinds(part))
    return (wanted,)


def _field_type(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].annotation if key in section.model_fields else Any


def _type_of(model: type[BaseModel], key: str) -> Any:
    """Type of the setting with a dotted name; Any where there is none."""
    wanted: Any = model
    for part in key.split("."):
        kinds = _kinds(wanted)
        section = next((kind for kind in kinds if _is_model(kind)), None)
        inside = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        wanted = inside if section is None else _field_type(section, part)
    return wanted


def apply_override(tree: dict[str, Any], override: str, model: type[BaseModel]) -> None:
    """Set `a.b=c` in place.

    Where the setting is text, c is that text; elsewhere it is read as in a file: `true`, `[1, 2]`, `3e-5`. `null` and
    a whole value in quotes mean what they mean in a file everywhere.
    """
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise SettingsError(
            f"override '{short(override)}': write section.key=value, for example reward.learning_rate=1e-5"
        )
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        if not isinstance(child, dict):
            child = tree[parent] = {}
        tree = child
    tree[last] = _override_value(_type_of(model, key), text)


def _override_value(wanted: Any, text: str) -> Any:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if str in _kinds(wanted) and not quoted and text not in ("null", "~"):
        return text
    try:
        return settle(wanted, load_yaml(text, as_written=True))
    except (YamlError, RecursionError):
        return text


def load(model: type[M], path: str | Path | None, overrides: Sequence[str] = (), *, section: str = "") -> M:
    """A validated `model` from the file (or its defaults alone) with the overrides on top. Raises SettingsError.

    section: the one that the command is about; its keys come first where an unknown key is like several.
    """
    tree = read_yaml(Path(path), model) if path is not None else {}
    for override in overrides:
        apply_override(tree, override, model)
    return validate(model, tree, path, overrides, section=section)


def validate(
    model: type[M],
    tree: Mapping[str, Any],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    section: str = "",
) -> M:
    """A `model` of the tree; path, overrides and section: for the errors, as in `load`. Raises SettingsError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
    groups: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        groups.setdefault(_field(model, detail), []).append(detail)
    lines = [explain(model, key, group, path, overrides, section) for key, group in groups.items()]
    raise SettingsError("\n".join(lines))


def _field(model: type[BaseModel], detail: ErrorDetails) -> str:
    """Dotted name of the field an error is about, without the branches of a union that pydantic appends."""
    names = [name for name, _ in walk(model)]
    parts = [str(part) for part in detail["loc"]]
    whole = ".".join(parts)
    return next((name for name in names if whole == name or whole.startswith(name + ".")), whole)


def explain(
    model: type[BaseModel],
    key: str,
    details: Sequence[ErrorDetails],
    path: str | Path | None,
    overrides: Sequence[str],
    section: str = "",
) -> str:
    """One line for the errors of one key: where, the key, its value, what is allowed, the nearest key or value."""
    first = details[0]
    where = next(
        (f"override '{short(o)}'" for o in overrides if _related(key, o.partition("=")[0])), str(path or "settings")
    )
    if first["type"] == "extra_forbidden":
        near = nearest_key(key, model, section)
        return f"{where}: unknown key '{short(key)}'{near}; `safe-rlhf-v settings` lists all keys"
    allowed = " or ".join(d["msg"].removeprefix("Input ").removeprefix("Value error, ") for d in details)
    choices = str(first.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(first["input"]), [c.strip("'") for c in choices], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    value = "" if isinstance(first["input"], Mapping | BaseModel) else f" = {_shown(first['input'])}"
    return f"{where}: {key or 'settings'}{value}: {allowed}{hint or _way_out(first)}"


def _way_out(detail: ErrorDetails) -> str:
    if detail["input"] is None:
        return "; delete the line to take the default"
    return "; write [first, second]" if detail["type"] == "list_type" else ""


def _shown(value: Any) -> str:
    """As one writes it in YAML, text in quotes, cut."""
    return short("null" if value is None else repr(value))


def short(text: str) -> str:
    """The text up to SHOWN characters; what is longer ends in three dots."""
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _related(key: str, overridden: str) -> bool:
    return f"{key}.".startswith(f"{overridden}.") or f"{overridden}.".startswith(f"{key}.")


def nearest_key(key: str, model: type[BaseModel], section: str = "") -> str:
    """`; did you mean 'x'?` for the setting whose last name is closest, or nothing.

    Those of the key's own section come first, then those of its stage; where it names none, those of `section`.
    """
    known = {name for name, _ in walk(model)} | {n.rpartition(".")[0] for n, _ in walk(model)} - {""}
    own, _, last = key.rpartition(".")
    own = own or section
    if key in known:
        return f"; write it below its section, as `{last}:` below `{own}:`"

    def score(name: str) -> float:
        parent, _, end = name.rpartition(".")
        near = 0.2 * (parent == own) or 0.1 * (name.partition(".")[0] == own.partition(".")[0])
        return difflib.SequenceMatcher(None, last, end).ratio() + near

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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
