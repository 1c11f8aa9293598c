"""A section in which one names a method of a table, with a section of its own for each of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from safe_rlhf_v.config.sections import Section, default_of, nested, section_of


class Methods(Section):
    """algorithm: a name of `table`. beta: what a method has of it by itself, unless it is named."""

    table: ClassVar[Mapping[str, Any]]
    algorithm: str
    beta: float | None

    @property
    def method(self) -> Any:
        """The class that `algorithm` names."""
        return self.table[self.algorithm]

    def made(self, **shared: Any) -> Any:
        """The method, of its own section and beta. shared: fields that stand in other sections."""
        return getattr(self, self.algorithm).made(beta=self.beta, **shared)

    @model_validator(mode="after")
    def _own_beta(self) -> Methods:
        if self.beta is None or "beta" not in self.model_fields_set:
            self.model_fields_set.discard("beta")
            own = default_of(self.method, "beta")
            self.__dict__["beta"] = default_of(_first(self.table), "beta") if own is None else own
        return self

    def unnamed(self) -> dict[str, Any]:
        return super().unnamed() | ({} if "beta" in self.model_fields_set else {"beta": None})


def _first(table: Mapping[str, Any]) -> Any:
    return next(iter(table.values()))


def methods_of(table: Mapping[str, Any], without: Collection[str]) -> Any:
    """The base of a section for these methods. without: their fields that stand in that section, or in another one."""
    choice: Any = (Literal[tuple(table)], Field(next(iter(table)), description=words_of(table)))
    named: Any = create_model("MethodsOfTable", __base__=Methods, algorithm=choice)
    made = nested(named, {name: section_of(kind, without=without) for name, kind in table.items()}, "algorithm")
    made.table = table
    return made


def words_of(table: Mapping[str, Any]) -> str:
    """What each is, in its own words."""
    return "; ".join(f"{name}: {kind.words}" for name, kind in table.items()) + "."


def own_values(table: Mapping[str, Any], field: str) -> str:
    """The default that each has of a field: "ppo_lag 0.02, group_lag 0.04"; those that have none are left out."""
    own = {name: default_of(kind, field) for name, kind in table.items()}
    return ", ".join(f"{name} {value:g}" for name, value in own.items() if value is not None)
