"""Categories of harm, levels of severity and their mapping to the standard moderation keys: read from a data file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.strict_yaml import YamlError, read_yaml

#: What stands as the category of a prompt known to be harmless (`Prompt.benign`); a missing category says nothing.
BENIGN = "benign"
#: Folder of the prompts of which the data does not say whether they are harmful; not the name of a category.
UNCATEGORISED = "uncategorised"


class TaxonomyError(UserError, ValueError):
    """A category is unknown, or a taxonomy file breaks its rules. The message names the nearest name or the field."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of severity: its name, its wording, and the harmless rates (-3..3) that stand for it."""

    name: str
    meaning: str
    harmless_rates: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Two levels of categories.

    primary: names, in the paper's order. secondary: names, in official order; their position is their index.
    levels: index = Severity. standard: each standard moderation key with the secondary categories that raise it.
    """

    name: str
    version: str
    primary: tuple[str, ...]
    secondary: tuple[str, ...]
    parents: Mapping[str, str]
    levels: tuple[Level, ...]
    standard: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if len(set(self.secondary)) != len(self.secondary):
            raise TaxonomyError(f"taxonomy {self.name!r}, field 'primary': a secondary name stands twice")
        for key, names in self.standard.items():
            for name in names:
                if name not in self.parents:
                    raise TaxonomyError(f"taxonomy {self.name!r}, field 'standard', key {key!r}: {self.unknown(name)}")

    @staticmethod
    def load(name: str | Path = "beavertails_v") -> Taxonomy:
        """A taxonomy shipped with the package, by name, or a YAML file of the same form, by path."""
        return _load(str(name))

    def primary_of(self, name: str) -> str:
        """The primary category of a secondary one. Raises TaxonomyError naming the nearest."""
        self.require([name])
        return self.parents[name]

    def index(self, name: str) -> int:
        """Position of a secondary category. Raises TaxonomyError naming the nearest."""
        self.require([name])
        return self._positions[name]

    def require(self, names: Iterable[str], *, also: Iterable[str] = ()) -> None:
        """Raise TaxonomyError unless every name is a secondary category or one of `also`."""
        for name in names:
            if name not in self.parents and name not in also:
                raise TaxonomyError(self.unknown(name))

    def unknown(self, name: str) -> str:
        """The sentence to say about a name that is none of ours."""
        near = difflib.get_close_matches(name, [*self.secondary, BENIGN], n=1, cutoff=0.0)
        return f"unknown category {name!r}; the nearest is {near[0]!r} (taxonomy {self.name} {self.version})"

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.secondary)}


@lru_cache
def _load(name: str) -> Taxonomy:
    folder = resources.files("beavertails_v") / "taxonomies"
    own = name.endswith((".yaml", ".yml"))
    file = Path(name) if own else folder / f"{name}.yaml"
    if not own and not file.is_file():
        have = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
        raise TaxonomyError(f"no taxonomy {name!r}; there is {', '.join(have)}, or give the path of a .yaml file")
    try:
        return _parsed(read_yaml(file))
    except YamlError as error:
        raise TaxonomyError(f"taxonomy file {file}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else "is of another form"
        raise TaxonomyError(f"taxonomy file {file} {why}; it has the form of beavertails_v.yaml") from None


def _parsed(data: Any) -> Taxonomy:
    parents = {child: primary["name"] for primary in data["primary"] for child in primary["secondary"]}
    levels = [
        Level(name=x["name"], meaning=x["meaning"], harmless_rates=tuple(x["harmless_rate"])) for x in data["levels"]
    ]
    return Taxonomy(
        name=data["name"],
        version=str(data["version"]),
        primary=tuple(primary["name"] for primary in data["primary"]),
        secondary=tuple(child for primary in data["primary"] for child in primary["secondary"]),
        parents=MappingProxyType(parents),
        levels=tuple(levels),
        standard=MappingProxyType({key: tuple(names) for key, names in data["standard"].items()}),
    )
