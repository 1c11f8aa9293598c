"""The stage `iterative`: one-shot or iterative dualisation, DPO on samples relabelled by r + lam.g."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.iterative.loop import IterativeArguments, IterativeResult, iterate, summary
from safe_rlhf_v.iterative.problem import ModelProblem, save_best
from safe_rlhf_v.stages import build, data
from safe_rlhf_v.stages.folder import StageResult
from safe_rlhf_v.stages.models import device, judges, look_first, one_process, require, start_model
from safe_rlhf_v.stages.stage import Plan
from safe_rlhf_v.training.encode import list_left_out
from safe_rlhf_v.training.supervised import limited_encoder
from safe_rlhf_v.vlm.kind import require_answering
from safe_rlhf_v.vlm.processing import load_processor


def iterative(settings: Settings) -> Plan:
    """The folder is the best iterate."""
    start, section = start_model(settings.model, settings.output_dir), settings.iterative
    sources = _policies(section) if section.method.from_preferences else None
    sources = sources or judges(settings.output_dir, section, "iterative")

    def work(folder: Path) -> StageResult:
        look_first(settings.data, start)
        one_process("train iterative")
        setup, pairs = build.setup(settings), data.comparisons(settings.data, "train")
        prompts, left_out = data.readable(pairs, limited_encoder(load_processor(start), setup, None))
        list_left_out(folder, left_out)
        problem = ModelProblem(section, setup, folder, start, tuple(sources.values()), prompts, device(), pairs)  # type: ignore[arg-type]
        result = iterate(problem, _arguments(section, folder))
        measured = {"algorithm": section.algorithm, "prompts": len(prompts), "left_out": len(left_out)}
        measured |= _saved(problem, result, setup.model.dtype)
        return StageResult(measured=measured, base=start, parts=_parts(problem, result))

    return Plan(work=work, inputs={"start": start, **sources})


def _policies(section: Any) -> dict[str, str]:
    """The two policies that stand for reward and cost model, by the settings that name them."""
    what = "the folder of a policy trained by `train direct`, direct.dpo.axis more_helpful or safer"
    keys = ("helpful_policy", "safe_policy")
    sources = {key: require(getattr(section, key), f"iterative.{key}", what) for key in keys}
    for key, folder in sources.items():
        require_answering(folder, f"iterative.{key}")
    return sources


def _arguments(section: Any, folder: Path) -> IterativeArguments:
    iterations = 1 if section.method.one_shot else section.iterations
    own = {"eta": section.eta, "confidence": section.confidence, "bootstrap": section.bootstrap}
    return IterativeArguments(output_dir=folder, iterations=iterations, **own)


def _saved(problem: ModelProblem, result: IterativeResult, dtype: str) -> dict[str, Any]:
    """Save the best iterate; returns what was measured. Raises SettingsError where no multiplier keeps the bounds."""
    section = problem.section
    if result.best is None:
        reach = dict(zip(problem.names, (round(x, 2) for x in result.one_shot.reachable), strict=True))
        raise SettingsError(
            f"iterative.bounds = {section.bounds} is out of reach: there is no finite multiplier for it. The best of "
            f"{section.samples} samples of every prompt improve by {reach}, each alone; ask for less, or raise "
            "iterative.samples"
        )
    chosen = result.iterates[result.best].iteration
    if not result.feasible:
        plain(f"no iteration keeps every bound; iteration {chosen}, which misses by least, is saved")
    save_best(problem.policy(chosen), problem.folder, dtype)
    return summary(result, problem.names, section.bounds) | {"reference_cost": problem.reference_cost()}


def _parts(problem: ModelProblem, result: IterativeResult) -> dict[str, str]:
    """The folder of each iteration that was trained, and the model it began with."""
    trained = [x.iteration for x in result.iterates if x.iteration]
    return {problem.policy(i).name: str(problem.base_of(i)) for i in trained}
