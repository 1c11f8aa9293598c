"""From a comparison's settings to its runs: every method with every seed, and the sweep of bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from safe_rlhf_v.comparison.base import Base
from safe_rlhf_v.comparison.planned import PlannedRun
from safe_rlhf_v.comparison.settings import IMITATING, CompareSettings, MethodSection, flat_overrides
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.stages.stages import STAGES

NAMED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Wanted:
    """A run before its settings are made."""

    name: str
    seed: int
    bound: float | None
    swept: bool


def plan_runs(compare: CompareSettings, base: Base, reference_cost: float) -> list[PlannedRun]:
    """Every run: seed by seed so that a comparison that is cut has whole seeds, the main bound before the sweep.

    reference_cost: mean cost of the model that all start from. Raises SettingsError naming the method.
    """
    runs = [_plan(compare, wanted, base, reference_cost) for wanted in _wanted(compare)]
    try:
        TopologicalSorter({run.method: {need.partition(" ")[0] for need in run.needs} for run in runs}).prepare()
    except CycleError as error:
        raise SettingsError(f"methods: {' needs '.join(error.args[1][::-1])}; none of them can be first") from None
    return runs


def _wanted(compare: CompareSettings) -> list[Wanted]:
    sweep = compare.sweep
    main = [Wanted(name, seed, compare.bound, False) for seed in compare.seeds for name in compare.methods]
    return main + [
        Wanted(name, seed, bound, True)
        for seed in (compare.seeds if sweep.seeds is None else sweep.seeds)
        for bound in sweep.bounds
        for name in sweep.methods
        if not (bound == compare.bound and seed in compare.seeds)
    ]


def _plan(compare: CompareSettings, wanted: Wanted, base: Base, reference_cost: float) -> PlannedRun:
    name, seed, method = wanted.name, wanted.seed, compare.methods[wanted.name]
    if method.stage not in STAGES:
        raise SettingsError(
            f"methods.{name}.stage: no command `safe-rlhf-v train {method.stage}`; there are {', '.join(STAGES)}"
        )
    at_bound = f"bound{wanted.bound:g}" if wanted.swept else ""
    folder = Path(compare.output_dir, "runs", name, at_bound, f"seed{seed}")
    needed = _needed(compare, name, seed)
    own = [_filled(o, compare, needed, seed) for o in flat_overrides(method.set)]
    overrides = [*base.shared, *own, *_imitation(compare, name), f"seed={seed}", f"output_dir={folder}"]
    overrides += _bound(method, wanted.bound, reference_cost)
    try:
        settings = load_settings(base.file, [*overrides, *_budget(compare, method, base, overrides)])
    except SettingsError as error:
        raise SettingsError(f"methods.{name}: {error}") from None
    return PlannedRun(
        method=name,
        title=method.title or name,
        stage=method.stage,
        seed=seed,
        folder=folder,
        settings=settings,
        model=str(folder / method.stage),
        bound=_requested(method, settings.model_dump(), reference_cost),
        swept=wanted.swept,
        needs=tuple(f"{other} seed {seed}" for other in needed),
    )


def _bound(method: MethodSection, bound: float | None, reference_cost: float) -> list[str]:
    """The override that asks a method for a fall of the mean cost."""
    if bound is None or not method.bound:
        return []
    at = reference_cost - bound if method.bound_is == "cost" else bound
    # the quantile goes with a threshold of auto alone
    return [f"{method.bound}={at:.4f}", *["policy.threshold_quantile=null"] * (method.bound == "policy.threshold")]


def _imitation(compare: CompareSettings, name: str) -> list[str]:
    """The imitation term of a method's stage: the comparison's, or none."""
    stage = compare.methods[name].stage
    if stage not in IMITATING:
        return []
    coefficient = compare.imitation.coefficient if compare.imitates(name) else 0
    return [f"{stage}.ptx_coeff={coefficient:g}", f"{stage}.demonstrations={compare.imitation.demonstrations}"]


def _needed(compare: CompareSettings, name: str, seed: int) -> list[str]:
    """Other methods whose models this one's settings name as {other}."""
    texts = [o.partition("=")[2] for o in flat_overrides(compare.methods[name].set)]
    needed = list(dict.fromkeys(other for text in texts for other in NAMED.findall(text)))
    if unknown := [other for other in needed if other not in compare.methods]:
        raise SettingsError(
            f"methods.{name}.set names {{{unknown[0]}}}, and there is no such method; there are "
            f"{', '.join(compare.methods)}"
        )
    if needed and seed not in compare.seeds:
        raise SettingsError(f"methods.{name}.set names {{{needed[0]}}}, which has no run with seed {seed}")
    return needed


def _filled(override: str, compare: CompareSettings, needed: Sequence[str], seed: int) -> str:
    key, _, text = override.partition("=")
    for other in needed:
        model = Path(compare.output_dir, "runs", other, f"seed{seed}", compare.methods[other].stage)
        text = text.replace(f"'{{{other}}}'", str(model)).replace(f"{{{other}}}", str(model))
    return f"{key}={text}"


def _budget(compare: CompareSettings, method: MethodSection, base: Base, overrides: Sequence[str]) -> list[str]:
    """policy.max_steps such that the run draws the budget's responses."""
    if compare.budget is None or method.stage != "policy":
        return []
    policy = load_settings(base.file, overrides).policy
    rollout = policy.per_device_train_batch_size * policy.num_generations
    if compare.budget < rollout:
        raise SettingsError(f"budget = {compare.budget}: one rollout is {rollout} responses already")
    return [f"policy.max_steps={compare.budget // rollout}"]


def _requested(method: MethodSection, tree: Mapping[str, Any], reference_cost: float) -> float | None:
    """The bound as a fall of the mean cost, where the setting is a number. tree: the run's settings."""
    if method.bound is None:
        return None
    value: Any = tree
    for part in method.bound.split("."):
        value = value[part]
    if isinstance(value, str) or value is None:
        return None
    return round(reference_cost - value if method.bound_is == "cost" else value, 3)
