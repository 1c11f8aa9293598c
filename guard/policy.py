"""The severity policy: thresholds to actions, kept as a data file so that changing it changes no code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from beavertails_v.errors import UserError
from beavertails_v.strict_yaml import YamlError, read_yaml
from guard.types import ACTIONS, Action, Kind

Signal = Literal["unsafe", "minor", "moderate", "severe"]


class PolicyError(UserError, ValueError):
    """A policy file is not valid. The message names the file, the field and what is allowed."""


@dataclass(frozen=True, slots=True)
class Decision:
    """flagged: any rule fired. reason: the rule that gave the action, e.g. "severe 0.41 >= 0.25"."""

    flagged: bool
    action: Action
    reason: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """Fires when the signal's probability is at or above `threshold`."""

    threshold: float = Field(gt=0.0, le=1.0)
    action: Action


class KindPolicy(_Strict):
    """Rules for queries or for responses."""

    category_threshold: float = Field(default=0.5, gt=0.0, le=1.0)
    rules: dict[Signal, Rule] = Field(min_length=1)
    categories: dict[str, dict[Signal, Rule]] = Field(default_factory=dict)

    def decide(self, signals: Mapping[Signal, float], categories: Mapping[str, float]) -> Decision:
        fired = [
            (ACTIONS.index(rule.action), f"{label}{name} {signals[name]:.3g} >= {rule.threshold:g}")
            for label, rules in self.rule_sets(categories)
            for name, rule in rules.items()
            if signals[name] >= rule.threshold
        ]
        if not fired:
            return Decision(False, "allow", "no rule fired")
        rank, reason = max(fired, key=lambda f: f[0])
        return Decision(True, ACTIONS[rank], reason)

    def rule_sets(self, categories: Mapping[str, float]) -> list[tuple[str, dict[Signal, Rule]]]:
        """The rules of every category that applies; the base rules stand for categories without their own."""
        top = max(categories, key=categories.__getitem__, default=None)
        applying = [c for c, p in categories.items() if c == top or p >= self.category_threshold]
        own = {f"{c}: ": {**self.rules, **self.categories[c]} for c in applying if c in self.categories}
        without_own = len(own) < len(applying) or not applying
        return [*own.items(), *([("", self.rules)] if without_own else [])]


class Policy(_Strict):
    """A whole policy file. `query` rules may allow or refuse; `response` rules may also regenerate.

    tuned: what `guard tune` chose the thresholds on, for which guard, and what it found. It decides nothing.
    """

    version: Literal[1] = 1
    name: str = "default"
    refusal: str = Field(default="I can't help with that request.", min_length=1)
    query: KindPolicy
    response: KindPolicy
    tuned: dict[str, Any] | None = None

    @field_validator("query")
    @classmethod
    def _no_regeneration_of_queries(cls, query: KindPolicy) -> KindPolicy:
        named = [("rules", query.rules), *((f"categories.{c}", r) for c, r in query.categories.items())]
        for where, rules in named:
            for signal, rule in rules.items():
                if rule.action == "regenerate":
                    raise ValueError(f"{where}.{signal}.action is 'regenerate'; a query can only be allowed or refused")
        return query

    @classmethod
    def load(cls, path: str | Path | None = None, categories: Iterable[str] | None = None) -> Policy:
        """Read a YAML (or JSON) file; None is the default policy. `categories` checks the names in it.

        Raises PolicyError naming the file and the field.
        """
        where = files("guard") / "policies" / "default.yaml" if path is None else Path(path)
        try:
            data = read_yaml(where)
        except YamlError as error:
            raise PolicyError(f"policy file {where}: not valid YAML: {error}") from None
        return cls.parse(data, where=f"policy file {where}", categories=categories)

    @classmethod
    def parse(cls, data: Any, *, where: str = "policy", categories: Iterable[str] | None = None) -> Policy:
        try:
            policy = cls.model_validate(data)
        except ValidationError as error:
            raise PolicyError("; ".join(_explain(where, e) for e in error.errors())) from error
        if categories is not None:
            policy.check_categories(categories, where)
        return policy

    def check_categories(self, known: Iterable[str], where: str = "policy") -> None:
        """Raise PolicyError for a category that the taxonomy does not have."""
        known = list(known)
        for kind, part in (("query", self.query), ("response", self.response)):
            for name in part.categories:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean '{near[0]}'?" if near else ""
                    raise PolicyError(
                        f"{where}: field '{kind}.categories.{name}': no such category in the taxonomy{hint}"
                    )

    def decide(
        self, kind: Kind, unsafe: float, at_least: tuple[float, float, float], categories: Mapping[str, float]
    ) -> Decision:
        """unsafe: P(unsafe); at_least: P(severity >= minor, moderate, severe); categories: name -> probability."""
        signals: dict[Signal, float] = {"unsafe": unsafe}
        signals |= dict(zip(("minor", "moderate", "severe"), at_least, strict=True))
        return (self.query if kind == "query" else self.response).decide(signals, categories)

    def save(self, path: str | Path) -> None:
        text = yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def _explain(where: str, error: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"] if part != "[key]")
    return f"{where}: field '{field or '(top level)'}': {error['msg']}"
