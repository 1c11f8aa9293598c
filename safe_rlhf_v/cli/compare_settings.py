"""The settings of a comparison: one base, named methods on top of it, seeds, bounds, claims."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from safe_rlhf_v.config import Count, Location, Positive, Section, SettingsError
from safe_rlhf_v.config_io import apply_override, read_yaml, validate
from safe_rlhf_v.evaluation.claims import Claim
from safe_rlhf_v.evaluation.comparison import REFERENCE


class MethodSection(Section):
    """One way to train: a stage of `safe-rlhf-v train` and the settings that make it this method."""

    title: str = Field("", description="Its name on the page; empty takes the key.")
    stage: str = Field("policy", description="The command `safe-rlhf-v train <stage>` that trains it.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings on top of base, as section.key: value. {name} in a value is the folder of the model that method `name` trained with the same seed.",
    )
    bound: str | None = Field(None, description="The setting that holds its bound on the cost; null: it has none.")
    bound_is: Literal["cost", "reduction"] = Field(
        "cost",
        description="cost: the mean cost stays at or under it (d); reduction: it falls by so much below the reference's (b).",
    )


class SweepSection(Section):
    """The same methods at several bounds, each the fall of the mean cost below the reference's."""

    methods: list[str] = Field(default_factory=list, description="Methods with a bound.")
    bounds: list[float] = Field(default_factory=list, description="Requested falls of the mean cost.")
    seeds: list[Count] | None = Field(None, description="Seeds of the sweep; null takes all.")


class WorldSection(Section):
    """The picture world that is drawn where base names no data."""

    train: Positive = Field(12_000, description="Training pairs.")
    evaluation: Positive = Field(600, description="Evaluation pairs.")


class CompareSettings(Section):
    output_dir: Location = Field("runs/compare", description="Everything goes below this folder.")
    settings: Location = Field(
        "quickstart", description="Settings file of a run that all methods share; quickstart: the demo's."
    )
    base: dict[str, Any] = Field(default_factory=dict, description="Settings on top of that file, for all methods.")
    world: WorldSection = WorldSection()
    seeds: list[Count] = Field(
        [0, 1, 2], min_length=1, description="Seeds of training; three or more, or nothing can be claimed."
    )
    budget: Positive | None = Field(
        None, description="Responses each run of `train policy` may draw: sets policy.max_steps; null leaves it."
    )
    bound: float | None = Field(
        None, description="Requested fall of the mean cost for all methods with a bound; null leaves their settings."
    )
    workers: Positive | None = Field(None, description="Processes at once; null: one a core.")
    methods: dict[str, MethodSection] = Field(min_length=1, description="Name -> method.")
    sweep: SweepSection = SweepSection()
    claims: list[Claim] = Field(default_factory=list, description="What the papers say; see docs/compare.md.")
    quick: dict[str, Any] = Field(default_factory=dict, description="Settings of this file that --quick replaces.")

    @model_validator(mode="after")
    def _names(self) -> CompareSettings:
        known = [*self.methods, REFERENCE]
        if REFERENCE in self.methods:
            raise ValueError(f"methods: '{REFERENCE}' names the model that all start from; choose another name")
        for where, name in [("sweep.methods", n) for n in self.sweep.methods] + [
            (f"claims[{i}]", n) for i, claim in enumerate(self.claims) for n in (claim.method, claim.against)
        ]:
            if name not in known:
                raise ValueError(f"{where}: no method '{name}'; there are {', '.join(self.methods)}")
        if missing := [n for n in self.sweep.methods if self.methods[n].bound is None]:
            raise ValueError(f"sweep.methods: {missing[0]} has no `bound`, so it cannot be swept")
        for name, values in (("seeds", self.seeds), ("sweep.bounds", self.sweep.bounds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values} names one twice")
        return self


def load_compare(path: Path | None, overrides: Sequence[str] = (), *, quick: bool = False) -> CompareSettings:
    """A comparison's settings; with quick, what stands under `quick` comes on top, then the overrides.

    A file with `extends: other.yaml` stands on top of that one, which lies beside it; errors name the upper one. A method that `quick.methods`
    leaves out is left out with its sweeps and claims; one it names keeps its settings. Raises SettingsError.
    """
    if path is None:
        raise SettingsError("give --config, for example --config configs/compare.yaml")
    tree = _extended(path)
    if quick:
        tree = _with_quick(tree, path)
    for override in overrides:
        apply_override(tree, override, CompareSettings)
    return validate(CompareSettings, tree, path, overrides)


def _extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    tree = dict(read_yaml(path, CompareSettings))
    if "extends" not in tree:
        return tree
    below = os.path.expanduser(str(tree.pop("extends")))
    if not (path.parent / below).is_file():
        raise SettingsError(f"{path}: extends = {below!r}: name a settings file that lies beside this one")
    if path.parent / below in (*above, path):
        raise SettingsError(f"{path}: extends = {below!r}: that one extends this one")
    return merge(_extended(path.parent / below, (*above, path)), tree)


def _with_quick(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    changes = tree.get("quick")
    if not isinstance(changes, dict) or not changes:
        raise SettingsError(f"{path}: --quick needs a section `quick` with the settings that it replaces")
    changes = dict(changes)
    wanted = changes.pop("methods", None)
    merged = merge({k: v for k, v in tree.items() if k != "quick"}, changes)
    if wanted is not None:
        merged = _only(merged, wanted, path)
    return merged


def _only(tree: dict[str, Any], wanted: Sequence[str], path: Path) -> dict[str, Any]:
    methods, sweep = tree.get("methods") or {}, tree.get("sweep") or {}
    if unknown := [name for name in wanted if name not in methods]:
        raise SettingsError(f"{path}: quick.methods: no method '{unknown[0]}'; there are {', '.join(methods)}")
    kept = {*wanted, REFERENCE}
    claims = [c for c in tree.get("claims") or [] if {c.get("method"), c.get("against", REFERENCE)} <= kept]
    sweep = {**sweep, "methods": [name for name in sweep.get("methods", []) if name in kept]}
    return {**tree, "methods": {name: methods[name] for name in wanted}, "sweep": sweep, "claims": claims}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key, everything else replaced."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def flat_overrides(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """{"policy": {"beta": 0.5}, "dual.kind": "log"} -> ["policy.beta=0.5", "dual.kind=log"]."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += flat_overrides(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
            found.append(f"{prefix}{key}={text.removesuffix('...' + chr(10)).strip()}")
    return found
