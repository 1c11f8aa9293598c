"""Settings of the constraint: the rules of the table `DUALS` and the measures of the table `MEASURES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from safe_rlhf_v import duals
from safe_rlhf_v.config.sections import Section, nested, section_of
from safe_rlhf_v.cost_measures import MEASURES, CostMeasure
from safe_rlhf_v.duals import DUALS, Ascent, Dual

if TYPE_CHECKING:
    Measure = str
    Rule = str
else:
    Measure, Rule = Literal[tuple(MEASURES)], Literal[(*DUALS, "fixed")]

# These share the settings of `Ascent`; each of the others has a section of its own.
CLIMBING = {name: rule for name, rule in DUALS.items() if issubclass(rule, Ascent)}
OTHERS = {name: section_of(rule) for name, rule in DUALS.items() if name not in CLIMBING}


class _MeasureKind(Section):
    kind: Measure = Field("mean", description="mean; high_confidence: mean + kappa standard deviations (HC-RLHF); cvar: mean of the worst 1 - alpha.")


class MeasureSection(section_of(*MEASURES.values(), name="Measures", base=_MeasureKind)):  # type: ignore[misc]
    """Of what the threshold is a bound."""

    def made(self) -> CostMeasure:
        return _made(MEASURES[self.kind], self)


class _DualKind(Section):
    kind: Rule | None = Field(None, description="log: the released code's update; additive: the paper's equation; augmented: augmented Lagrangian; pid: PID control; fixed: stays at initial (reward shaping; 0: reward alone). null takes the algorithm's own: log, but additive where it would only rise.")


_INITIAL = {"initial": "10 [code], or 0 for an algorithm whose multiplier never falls"}


class DualSection(nested(section_of(*CLIMBING.values(), name="Rules", base=_DualKind, null=_INITIAL), OTHERS, "kind")):  # type: ignore[misc]
    """The multiplier lambda >= 0 on the cost."""

    @model_validator(mode="after")
    def _bounds(self) -> DualSection:
        if self.initial is not None and (self.kind is None or self.kind in CLIMBING):
            _made(CLIMBING.get(self.kind or "", Ascent), self)
        return self

    def with_own(self, own: Mapping[str, Any]) -> DualSection:
        """The same, with what an algorithm has by itself where it is not named."""
        found = self.model_copy()
        for name in self._open():
            found.__dict__[name] = own.get(name, _default(name))
        found.model_fields_set.difference_update(self._open())
        return found

    def made(self) -> Dual:
        if self.kind == "fixed":
            return duals.fixed(self.initial)
        return getattr(self, self.kind).made() if self.kind in OTHERS else _made(DUALS[self.kind], self)

    def named(self) -> str | None:
        """The rule that the user named."""
        return None if "kind" in self._open() else self.kind

    def _open(self) -> set[str]:
        return {name for name in ("kind", "initial") if name not in self.model_fields_set or getattr(self, name) is None}

    def unnamed(self) -> dict[str, Any]:
        return dict.fromkeys(sorted(self._open()))


def _default(name: str) -> Any:
    return next((f.default for f in fields(Ascent) if f.name == name), None)


def _made(kind: type, section: Section) -> Any:
    """One of a dataclass, of the fields of a flat section that it has."""
    return kind(**{f.name: getattr(section, f.name) for f in fields(kind)})
