"""The stages that train on the data as they are: sft, reward, cost, guard and direct."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safe_rlhf_v.config import Settings
from safe_rlhf_v.stages import build, data
from safe_rlhf_v.stages.folder import StageResult
from safe_rlhf_v.stages.models import base_model, judges, look_first, start_model
from safe_rlhf_v.stages.stage import Plan
from safe_rlhf_v.statistics import Resampling
from safe_rlhf_v.training.supervised import train_preference_model, train_sft
from safe_rlhf_v.vlm.kind import require_answering


def sft(settings: Settings) -> Plan:
    """Supervised fine-tuning of model.path."""
    base = base_model(settings.model)

    def work(folder: Path) -> StageResult:
        look_first(settings.data, base)
        measured = train_sft(*data.both(settings.data), base, folder, settings.sft, build.setup(settings))
        return StageResult(measured=measured, base=base)

    return Plan(work=work)


def preference(kind: Literal["reward", "cost"], settings: Settings) -> Plan:
    """The reward or the cost model, on the model the policy starts from."""
    start, section = start_model(settings.model, settings.output_dir), getattr(settings, kind)

    def work(folder: Path) -> StageResult:
        look_first(settings.data, start)
        pairs = data.both(settings.data)
        measured = train_preference_model(kind, *pairs, start, folder, section, build.setup(settings))
        return StageResult(measured=measured, base=start)

    return Plan(work=work, inputs={"start": start})


def guard(settings: Settings) -> Plan:
    """The guard, on the model the policy starts from."""
    start, section, figures = start_model(settings.model, settings.output_dir), settings.guard, settings.evaluation

    def work(folder: Path) -> StageResult:
        from guard.policy import Policy
        from guard.train import shown, train_guard

        look_first(settings.data, start)
        measured = train_guard(
            data.responses(settings.data, "train"),
            data.responses(settings.data, "evaluation"),
            start,
            folder,
            section,
            build.setup(settings),
            benign=data.benign_prompts(section.benign, settings.data, "train"),
            benign_evaluation=data.benign_prompts(section.benign, settings.data, "evaluation"),
            options=section.made(),
            policy=Policy.load(section.policy) if section.policy else None,
            resampling=Resampling(level=figures.confidence, draws=figures.bootstrap, seed=settings.seed),
        )
        return StageResult(measured=measured, base=start, shown=shown(measured))

    return Plan(work=work, inputs={"start": start})


def direct(settings: Settings) -> Plan:
    """Training on pairs without sampling: DPO and its safe variants; the folder is a whole model."""
    from safe_rlhf_v.direct import train as trained

    start, section = start_model(settings.model, settings.output_dir), settings.direct
    if section.reference:
        require_answering(section.reference, "direct.reference")
    algorithm = section.made(allow_contradictory=settings.data.allow_contradictory)
    scores: dict[str, Any] = {}
    if getattr(algorithm, "needs_scores", False):
        scores = {**judges(settings.output_dir, section, "direct")}

    def work(folder: Path) -> StageResult:
        look_first(settings.data, start)
        shared: Any = (*data.both(settings.data), start, folder, section, build.setup(settings), section.reference)
        if hasattr(algorithm, "stages"):  # it is two, one after the other
            first, second = trained.STAGES
            measured = trained.train_sacpo(algorithm, *shared)
            base, parts = str(folder / second), {first: start, second: str(folder / first)}
            return StageResult(measured=measured, base=base, parts=parts)
        return StageResult(measured=trained.train_direct(algorithm, *shared, **scores), base=start)

    reference = {"reference": section.reference} if section.reference else {}
    return Plan(work=work, inputs={"start": start, **scores, **reference})
