"""The settings of a comparison: one base, named methods on top of it, seeds, bounds, claims."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from safe_rlhf_v.algorithms import ONLINE
from safe_rlhf_v.comparison.claims import Claim
from safe_rlhf_v.comparison.runs import REFERENCE
from safe_rlhf_v.config import Count, Location, Positive, Rate, Section, SettingsError
from safe_rlhf_v.config_io import apply_override, read_yaml, validate

CONTROL = "control"
IMITATING = ("policy", "direct", "iterative")
"""Stages that can imitate demonstrations beside what they do."""


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

    @property
    def imitates_alone(self) -> bool:
        own = dict(o.split("=", 1) for o in flat_overrides(self.set))
        kind = ONLINE.get(own.get("policy.algorithm", ""))
        return self.stage == "policy" and kind is not None and kind.needs_demonstrations


class SweepSection(Section):
    """The same methods at several bounds, each the fall of the mean cost below the reference's."""

    methods: list[str] = Field(default_factory=list, description="Methods with a bound.")
    bounds: list[float] = Field(default_factory=list, description="Requested falls of the mean cost.")
    seeds: list[Count] | None = Field(None, description="Seeds of the sweep; null takes all.")


class WorldSection(Section):
    """The picture world that is drawn where base names no data."""

    train: Positive = Field(12_000, description="Training pairs.")
    evaluation: Positive = Field(600, description="Evaluation pairs.")


class ImitationSetting(Section):
    """The same imitation term for all arms or for none: cross-entropy on demonstrations beside a method's own loss."""

    arms: Literal["none", "all"] = Field(
        "none", description="all: every method has the term; none: the imitation-only arm alone, if there is one."
    )
    coefficient: Rate = Field(1.2, description="Its weight: ptx_coeff of the policy, direct and iterative sections.")
    demonstrations: Literal["all", "more_helpful", "safer", "both"] = Field(
        "both", description="Which responses of the training pairs; both: those preferred on both axes."
    )


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
    imitation: ImitationSetting = ImitationSetting()
    workers: Positive | None = Field(None, description="Processes at once; null: one a core.")
    methods: dict[str, MethodSection] = Field(min_length=1, description="Name -> method.")
    sweep: SweepSection = SweepSection()
    claims: list[Claim] = Field(default_factory=list, description="What the papers say; see docs/compare.md.")
    quick: dict[str, Any] = Field(default_factory=dict, description="Settings of this file that --quick replaces.")

    @model_validator(mode="after")
    def _names(self) -> CompareSettings:
        known = [*self.methods, REFERENCE, CONTROL]
        for name, what in ((REFERENCE, "the model that all start from"), (CONTROL, "what methods are held against")):
            if name in self.methods:
                raise ValueError(f"methods: '{name}' names {what}; choose another name")
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
        _refuse_own_imitation(self)
        self.__dict__["claims"] = [_controlled(i, claim, self) for i, claim in enumerate(self.claims)]
        return self

    @property
    def control(self) -> str:
        """What a method is held against to see what it does beside imitation: the start model, or imitation alone."""
        alone = [name for name, method in self.methods.items() if method.imitates_alone]
        return alone[0] if alone and self.imitation.arms == "all" else REFERENCE

    def imitates(self, name: str) -> bool:
        """Whether a method has the imitation term."""
        if name == REFERENCE:
            return False
        method = self.methods[name]
        return method.imitates_alone or (self.imitation.arms == "all" and method.stage in IMITATING)


def _refuse_own_imitation(settings: CompareSettings) -> None:
    own = {f"methods.{name}.set": flat_overrides(method.set) for name, method in settings.methods.items()}
    own["base"] = flat_overrides(settings.base)
    for where, overrides in own.items():
        keys = {o.partition("=")[0] for o in overrides}
        if wrong := sorted(keys & {f"{s}.{k}" for s in IMITATING for k in ("ptx_coeff", "demonstrations")}):
            raise ValueError(f"{where}: {wrong[0]} is set by `imitation`, for all methods alike; take it out here")


def _controlled(i: int, claim: Claim, settings: CompareSettings) -> Claim:
    """The claim with `control` replaced by what it stands for. Raises ValueError where one side imitates and the other
    does not, so that the difference would be imitation's."""
    if claim.against == CONTROL:
        if settings.imitation.arms == "all" and settings.control == REFERENCE:
            raise ValueError(
                f"claims[{i}]: against {CONTROL} with imitation.arms all needs an arm that imitates alone: a method "
                "with set: {policy.algorithm: imitation}"
            )
        claim = claim.model_copy(update={"against": settings.control})
    two_sided = claim.kind in ("difference", "equal_cost", "equal_reward", "bound_error")
    alone = claim.method != REFERENCE and settings.methods[claim.method].imitates_alone
    if two_sided and not alone and settings.imitates(claim.method) != settings.imitates(claim.against):
        first, second = sorted((claim.method, claim.against), key=settings.imitates, reverse=True)
        raise ValueError(
            f"claims[{i}]: {first} imitates demonstrations and {second} does not, so imitation may be all their "
            f"difference; write against: {CONTROL}, or compare two that imitate alike (imitation.arms)"
        )
    return claim


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
    kept = {*wanted, REFERENCE, CONTROL}
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
