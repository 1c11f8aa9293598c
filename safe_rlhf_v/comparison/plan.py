"""From a comparison's settings to the runs and the commands they are made of.

Every run is one ordinary command with one ordinary settings file, runs/<method>[/bound<b>]/seed<s>/run.yaml below
output_dir, so that whoever wants to repeat or change one does it by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib import resources
from pathlib import Path
from typing import Any

from safe_rlhf_v.comparison.runs import REFERENCE
from safe_rlhf_v.comparison.settings import IMITATING, CompareSettings, MethodSection, flat_overrides
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.jobs.progress import share_of_steps
from safe_rlhf_v.jobs.scheduler import Job
from safe_rlhf_v.stages.folder import BOOKKEEPING, read_done, write_json

STAGES = ("sft", "reward", "cost", "policy", "direct", "iterative", "guard")
"""What `safe-rlhf-v train` knows, in its order."""
MEASURING = ("evaluation", "generation", "guard")
"""Sections that a training stage does not depend on: changed, a run is measured again and not trained again."""
NAMED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One method, seed and bound. bound: requested fall of the mean cost; None leaves the setting as it is. swept: it
    belongs to the sweep alone. model: what is measured."""

    method: str
    title: str
    stage: str
    seed: int
    folder: Path
    settings: Settings
    model: str
    bound: float | None = None
    swept: bool = False
    needs: tuple[str, ...] = ()
    """Names of the runs whose models this one reads."""

    @property
    def name(self) -> str:
        at = "" if not self.swept else f" at {self.bound:g}"
        return f"{self.method}{at} seed {self.seed}"


# ---------------------------------------------------------------------------------------------------- the base


def base_settings(compare: CompareSettings) -> Settings:
    """What all methods share. Model and data below <output_dir>/base where the settings name none."""
    output = Path(compare.output_dir, "base")
    overrides = [*flat_overrides(compare.base), f"output_dir={output}"]
    if compare.settings == "quickstart":
        packaged = resources.files("safe_rlhf_v.demo").joinpath("quickstart.yaml")
        with resources.as_file(packaged) as path:
            settings = load_settings(path, overrides)
    else:
        settings = load_settings(compare.settings, overrides)
        for name, value in (("model.path", settings.model.path), ("data.path", settings.data.path)):
            if not value:
                raise SettingsError(f"{compare.settings}: {name} is not set; the picture world is for quickstart alone")
    settings.model.path = settings.model.path or str(output / "start")
    settings.data.path = settings.data.path or str(output / "data")
    return settings


def base_stages(settings: Settings) -> list[str]:
    """Stages of the base that compare has to see done: those whose models the settings do not name."""
    given = {
        "sft": settings.model.start,
        "reward": settings.policy.reward_model,
        "cost": settings.policy.cost_model,
    }
    return [stage for stage, path in given.items() if not path]


def base_jobs(settings: Settings) -> list[Job]:
    """sft, then reward and cost beside each other, where they are not given."""
    folder = Path(settings.output_dir)
    stages = base_stages(settings)
    return [
        Job(
            name=f"base {stage}",
            kind=stage,
            command=[*CLI, "train", stage, "--config", str(folder / "run.yaml")],
            log=folder / f"{stage}.log",
            done=lambda stage=stage: read_done(folder / stage) is not None,  # type: ignore[misc]
            after=["base sft"] if stage != "sft" and "sft" in stages else [],
        )
        for stage in stages
    ]


CLI = (sys.executable, "-m", "safe_rlhf_v.cli")


def reference_run(settings: Settings, base_yaml: Path) -> PlannedRun:
    """The model that all methods start from, to be measured as they are."""
    shared = load_settings(base_yaml, shared_models(settings))
    model = str(shared.model.start)
    folder = Path(settings.output_dir) / "reference"
    return PlannedRun(
        method=REFERENCE, title="start model", stage="", seed=settings.seed, folder=folder, settings=shared, model=model
    )


def shared_models(base: Settings) -> list[str]:
    """Overrides that give every stage the base's start, reward and cost model."""
    folder = Path(base.output_dir)
    models = {kind: getattr(base.policy, f"{kind}_model") or str(folder / kind) for kind in ("reward", "cost")}
    overrides = [f"model.start={base.model.start or folder / 'sft'}"]
    for section, info in Settings.model_fields.items():
        known = getattr(info.annotation, "model_fields", {})
        overrides += [f"{section}.{k}_model={path}" for k, path in models.items() if f"{k}_model" in known]
    return overrides


# ---------------------------------------------------------------------------------------------------- the runs


def plan_runs(compare: CompareSettings, base: Settings, base_yaml: Path, reference_cost: float) -> list[PlannedRun]:
    """Every run: seed by seed so that a comparison that is cut has whole seeds, the main bound before the sweep.

    reference_cost: mean cost of the model that all start from. Raises SettingsError naming the method.
    """
    wanted = [(seed, name, compare.bound, False) for seed in compare.seeds for name in compare.methods]
    sweep = compare.sweep
    wanted += [
        (seed, name, bound, True)
        for seed in (compare.seeds if sweep.seeds is None else sweep.seeds)
        for bound in sweep.bounds
        for name in sweep.methods
        if not (bound == compare.bound and seed in compare.seeds)
    ]
    shared = shared_models(base)
    runs = [_plan(compare, *one, base_yaml, shared, reference_cost) for one in wanted]
    try:
        TopologicalSorter({run.method: {need.partition(" ")[0] for need in run.needs} for run in runs}).prepare()
    except CycleError as error:
        raise SettingsError(f"methods: {' needs '.join(error.args[1][::-1])}; none of them can be first") from None
    return runs


def _plan(
    compare: CompareSettings,
    seed: int,
    name: str,
    bound: float | None,
    swept: bool,
    base_yaml: Path,
    shared: Sequence[str],
    reference_cost: float,
) -> PlannedRun:
    method = compare.methods[name]
    if method.stage not in STAGES:
        raise SettingsError(
            f"methods.{name}.stage: no command `safe-rlhf-v train {method.stage}`; there are {', '.join(STAGES)}"
        )
    folder = Path(compare.output_dir) / "runs" / name / (f"bound{bound:g}" if swept else "") / f"seed{seed}"
    needed = _needed(compare, name, seed)
    own = [_filled(o, compare, needed, seed) for o in flat_overrides(method.set)]
    overrides = [*shared, *own, *_imitation(compare, name), f"seed={seed}", f"output_dir={folder}"]
    if bound is not None and method.bound:
        at = reference_cost - bound if method.bound_is == "cost" else bound
        overrides.append(f"{method.bound}={at:.4f}")
        if method.bound == "policy.threshold":
            overrides.append("policy.threshold_quantile=null")  # it goes with a threshold of auto alone
    try:
        settings = load_settings(base_yaml, [*overrides, *_budget(compare, method, base_yaml, overrides)])
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
        bound=_requested(method, settings, reference_cost),
        swept=swept,
        needs=tuple(f"{other} seed {seed}" for other in needed),
    )


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


def _budget(compare: CompareSettings, method: MethodSection, base_yaml: Path, overrides: Sequence[str]) -> list[str]:
    """policy.max_steps such that the run draws the budget's responses."""
    if compare.budget is None or method.stage != "policy":
        return []
    policy = load_settings(base_yaml, overrides).policy
    rollout = policy.per_device_train_batch_size * policy.num_generations
    if compare.budget < rollout:
        raise SettingsError(f"budget = {compare.budget}: one rollout is {rollout} responses already")
    return [f"policy.max_steps={compare.budget // rollout}"]


def _requested(method: MethodSection, settings: Settings, reference_cost: float) -> float | None:
    """The bound as a fall of the mean cost, where the setting is a number."""
    if method.bound is None:
        return None
    value: Any = settings.model_dump()
    for part in method.bound.split("."):
        value = value[part]
    if isinstance(value, str) or value is None:
        return None
    return round(reference_cost - value if method.bound_is == "cost" else value, 3)


# ---------------------------------------------------------------------------------------------------- its commands


def write_run(run: PlannedRun) -> None:
    """run.yaml and plan.json. Raises SettingsError where the folder holds a run of other settings."""
    file = run.folder / "run.yaml"
    if file.is_file():
        before = load_settings(file)
        changed = [k for k, v in training_identity(run.settings).items() if training_identity(before).get(k) != v]
        if changed:
            raise SettingsError(
                f"{run.folder} holds a run with other settings ({', '.join(changed[:4])}): choose another output_dir, "
                f"or delete that folder to run {run.name} again"
            )
    run.settings.save(file)
    known = {"method": run.method, "title": run.title, "stage": run.stage, "seed": run.seed, "requested": run.bound}
    plan = {**known, "swept": run.swept, "model": run.model, "identity": measuring_identity(run)}
    write_json(run.folder / "plan.json", plan)


def _flat(settings: Settings) -> dict[str, str]:
    return dict(o.split("=", 1) for o in flat_overrides(settings.model_dump(mode="json")))


def training_identity(settings: Settings) -> dict[str, str]:
    """What a training depends on."""
    return {
        key: value
        for key, value in _flat(settings).items()
        if key.partition(".")[0] not in MEASURING and key.rpartition(".")[2] not in BOOKKEEPING
    }


def measuring_identity(run: PlannedRun) -> str:
    """Changes where a run has to be measured again: how it is measured, or what was trained."""
    tree = {k: v for k, v in _flat(run.settings).items() if k.rpartition(".")[2] not in BOOKKEEPING}
    tree |= {"requested": str(run.bound), "swept": str(run.swept)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def run_job(run: PlannedRun) -> Job:
    """Train and measure in one process: to begin one costs as much as several rollouts of a small model."""
    folder = run.folder
    section = getattr(run.settings, run.stage, None)
    return Job(
        name=run.name,
        kind=f"run {run.method}",
        command=[sys.executable, "-m", "safe_rlhf_v.comparison.run", str(folder)],
        log=folder / "run.log",
        done=lambda: measured(folder),
        after=run.needs,
        progress=lambda: share_of_steps(folder / run.stage, getattr(section, "max_steps", None)),
    )


def infeasible(folder: Path) -> bool:
    """Whether an iterative stage found that its bound is out of reach: a result, though there is no model."""
    file = folder / "iterations.json"
    state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(state.get("one_shot", {}).get("verdict") == "infeasible")


def measured(folder: Path) -> bool:
    """Whether the run was measured as its plan.json says."""
    file = folder / "measured.json"
    if not file.is_file():
        return False
    plan: Mapping[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return bool(json.loads(file.read_text(encoding="utf-8")).get("identity") == plan["identity"])


