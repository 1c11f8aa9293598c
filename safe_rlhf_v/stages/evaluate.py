"""The report of a run: the aligned model against its start, judged by the known truth or by the trained models."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beavertails_v import Leakage, Prompt, leakage, load_responses
from guard.classifier import Guard
from guard.regenerate import GenerativePolicy, regenerate, safety_by_round
from safe_rlhf_v import duals
from safe_rlhf_v.config import Settings
from safe_rlhf_v.console import plain
from safe_rlhf_v.evaluation import (
    Answer,
    Benchmark,
    Resampling,
    benchmark_of,
    build_report,
    collect,
    read_metrics,
    safety_test,
    write_report,
)
from safe_rlhf_v.evaluation.judges import Severities, without_guard
from safe_rlhf_v.evaluation.preference import read_preference
from safe_rlhf_v.models.kind import require_answering
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.answering import Answering, Scoring
from safe_rlhf_v.stages.folder import LEFT_OUT, read_done, require_writable
from safe_rlhf_v.stages.stages import readable, threshold
from safe_rlhf_v.training.encode import listing, write_left_out

STAGES = ("sft", "reward", "cost", "guard", "policy", "direct", "iterative")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Write report.html, report.json and left_out.jsonl into the model's `report_folder`.

    Returns {"headline": ..., "report": path of the page, "model": the judged one, "usual": it is the run's policy}.
    """
    start = time.monotonic()
    output = Path(settings.output_dir)
    require_writable(output)
    reward_dir = build.trained(settings, "reward", settings.policy.reward_model, "policy.reward_model")
    cost_dir = build.trained(settings, "cost", settings.policy.cost_model, "policy.cost_model")
    aligned_dir = build.trained(settings, "policy", settings.evaluation.model, "evaluation.model")
    given = settings.evaluation.base
    base_dir = require_answering(given, "evaluation.base") if given else build.start_model(settings)
    folder, listed = report_folder(aligned_dir, output)
    held_out = build.comparisons(settings, "evaluation")
    scorer = Scoring(reward_dir, cost_dir, settings)
    guard = _guard(settings)
    benchmark = benchmark_of(held_out.prompts(), scorer, _severities(guard))
    aligned, base = Answering(aligned_dir, settings), Answering(base_dir, settings)
    with listing(listed):
        prompts, left_out = readable(held_out, base.encoder, thorough=True, listed=listed)
    write_left_out(listed, left_out)
    benchmark = replace(benchmark, prompts=prompts)
    answers = []
    for name, model in (("base", base), ("aligned", aligned)):
        torch.manual_seed(settings.seed)
        answers.append(
            collect(
                model,
                benchmark,
                settings.evaluation.samples,
                scorer=scorer,
                batch_size=model.batch_size,
                label=name,
            )
        )
    rounds = _rounds(settings, guard, base, benchmark)
    data = build_report(
        before=answers[0],
        after=answers[1],
        benchmark=benchmark,
        constraint=_constraint(settings, threshold(settings, cost_dir), answers[1]),
        reward_model=read_preference(Path(reward_dir), "reward"),
        cost_model=read_preference(Path(cost_dir), "cost"),
        guard=((read_done(output / "guard") or {}).get("measured") or {}).get("evaluation"),
        guard_rounds=rounds,
        metrics=[] if _is_of("direct", settings) or _is_of("iterative", settings) else _metrics(output),
        seconds=_seconds(output) | {"evaluation": round(time.monotonic() - start, 1)},
        settings=settings.model_dump(mode="json"),
        examples=settings.evaluation.examples,
        notes=leakage_notes(settings, prompts) + _not_judged(rounds),
        subtitle=f"{settings.model.path} on {settings.data.path}",
        seed=settings.seed,
        models={"base": str(base_dir), "aligned": str(aligned_dir), "reward": str(reward_dir), "cost": str(cost_dir)},
        resampling=Resampling(
            level=settings.evaluation.confidence, draws=settings.evaluation.bootstrap, seed=settings.seed
        ),
    )
    page = write_report(data, folder)
    shown = ("unsafe_rate", "benign_helpfulness", "over_refusal_rate", "mean_cost", "mean_reward")
    headline = {side: {name: getattr(getattr(data, side), name) for name in shown} for side in ("base", "aligned")}
    of = {"model": str(aligned_dir), "usual": folder == output}
    return {"headline": headline | {"judge": benchmark.judge.name}, "report": str(page)} | of


def report_folder(model: str | Path, output: Path) -> tuple[Path, Path]:
    """Where a model's report goes, and its left_out.jsonl: the policy's to the top of `output`, that of any other model
    into <output>/evaluation/<its name>, so that none is written over another.
    """
    path, top, below = Path(model).resolve(), output.resolve(), output / "evaluation"
    if path == top / "policy":
        return output, below / LEFT_OUT
    if path.is_relative_to(top):
        name = "--".join(path.relative_to(top).parts)
    elif path.exists():  # two folders elsewhere may end alike
        name = f"{'--'.join(path.parts[-2:])}--{zlib.crc32(os.fsencode(path)):08x}"
    else:
        name = str(model).replace("/", "--")  # a hub id
    return below / name, below / name / LEFT_OUT


def leakage_notes(settings: Settings, prompts: Sequence[Prompt]) -> list[str]:
    """A warning for each training split of a stage below output_dir that shares prompts or pictures with these.

    A split on this machine is read once more, header of pictures only; one that is gone is passed over.
    """
    files = [Path(settings.output_dir) / stage / "stage.json" for stage in STAGES]
    made = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    keys = ("data.path", "data.train_split", "data.revision", "data.columns")
    sources = dict.fromkeys(tuple(x.get(key) for key in keys) for x in made)
    notes = []
    for path, split, revision, columns in sources:
        if Path(path).exists() or path == settings.data.path:
            train = load_responses(path, split, revision=revision, columns=columns, check_images="header")
            notes += _leaks(leakage(train.prompts(), prompts), len(prompts), f"{path} [{split}]")
    return notes


def _not_judged(rounds: Sequence[dict[str, Any]]) -> list[str]:
    count = rounds[-1]["not_judged"] if rounds else 0
    return [f"The guard could not judge {count} prompt{'s' * (count != 1)} of its loop, and refused."] if count else []


def _leaks(found: Leakage, count: int, source: str) -> list[str]:
    same = {i for _, rows in found.prompts.values() for i in rows}
    alike = {i for _, rows in found.pictures.values() for i in rows} - same
    if not same | alike:
        return []
    return [
        f"Leakage: {len(same | alike)} of {count} evaluation prompts are known from the training data {source}: "
        f"{len(same)} stand there word for word with their pictures, {len(alike)} share{'s' * (len(alike) == 1)} a "
        "picture alone. Results on them may be memory; `safe-rlhf-v data leakage` lists the training rows to leave out."
    ]


def _guard(settings: Settings) -> Guard | None:
    folder = settings.guard.path or str(Path(settings.output_dir) / "guard")
    if settings.guard.path is None and not read_done(Path(folder)):
        return None
    return Guard.from_pretrained(
        folder, policy=settings.guard.policy, device=build.device(), dtype=settings.model.dtype
    )


def _severities(guard: Guard | None) -> Severities | None:
    """The guard's grades of answers; None where it cannot judge any."""
    if guard is None or not guard.can_judge("response"):
        return None
    return lambda prompts, texts: [verdict.severity for verdict in guard.judge(prompts, texts)]


def _rounds(settings: Settings, guard: Guard | None, base: Answering, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Safety of the start model behind the guard after 0, 1, ... rounds, by a judge that is not the guard.

    On prompts that invite harm, with what the guard refuses of harmless ones beside it; the guard sees answers alone,
    so that round 0 is the model as it is.
    """
    if guard is None or not settings.evaluation.guard_rounds or base.sampling.temperature == 0:
        return []
    harmful = [p for p in benchmark.prompts if benchmark.invites_harm(p)]
    if not harmful or not guard.can_judge("response"):
        why = "no prompt is known to invite harm" if not harmful else "the guard was not trained to judge responses"
        plain(f"no rounds of the guard: {why}")
        return []
    torch.manual_seed(settings.seed)
    policy = GenerativePolicy(base, base.encoder, base.sampling, base.batch_size)
    most = settings.guard.max_rounds
    judge = without_guard(benchmark.judge)
    harmless = [p for p in benchmark.prompts if benchmark.invites_harm(p) is False]
    transcripts, needless = (regenerate(policy, guard, some, most, judge_query=False) for some in (harmful, harmless))
    return safety_by_round(transcripts, lambda prompt, text: judge([prompt], [text])[0].unsafe, most, needless)


def _is_of(stage: str, settings: Settings) -> bool:
    """Whether the measured model is that of the stage, or one of its parts."""
    folder = Path(settings.output_dir, stage).resolve()
    return bool(settings.evaluation.model) and Path(str(settings.evaluation.model)).resolve().is_relative_to(folder)


def _direct_constraint(settings: Settings, bound: float) -> dict[str, Any]:
    """Most direct methods know no bound and no multiplier; it is the policy section's that is measured against."""
    direct = settings.direct
    measured = ((read_done(Path(settings.output_dir, "direct")) or {}).get("measured")) or {}
    multiplier = direct.sacpo.lam if direct.algorithm == "sacpo" else measured.get("multiplier", 0.0)
    bound = direct.c_dpo.threshold if direct.algorithm == "c_dpo" else bound
    return {"threshold": bound, "final_multiplier": multiplier, "algorithm": direct.algorithm}


def _iterative_constraint(settings: Settings, bound: float) -> dict[str, Any]:
    """The bound on the mean over all prompts is the start model's mean cost less what was asked; else the policy's."""
    measured = ((read_done(Path(settings.output_dir, "iterative")) or {}).get("measured")) or {}
    multipliers, asked = measured.get("multiplier", {}), measured.get("requested")
    asked = asked.get("all") if isinstance(asked, dict) else asked
    bound = bound if asked is None else measured["reference_cost"] - asked
    found = {"threshold": bound, "final_multiplier": max(multipliers.values(), default=0.0)}
    return found | {"algorithm": settings.iterative.algorithm}


def _constraint(settings: Settings, bound: float, answers: Sequence[Answer]) -> dict[str, Any]:
    if _is_of("direct", settings):
        return _direct_constraint(settings, bound)
    if _is_of("iterative", settings):
        return _iterative_constraint(settings, bound)
    rule: Any = build.dual(settings)
    rows = _metrics(Path(settings.output_dir))
    costs = {i: a.cost for i, a in enumerate(answers) if a.cost is not None}
    of = [answers[i].prompt.id for i in costs]
    bounded = bounded_instead(settings, bound, list(costs.values()), of) if costs else None
    tested = None
    if costs and (bounded is None or settings.policy.measure.kind == "high_confidence"):  # it tests the mean
        tested = safety_test(list(costs.values()), bound, of, delta=settings.evaluation.delta)
    return {
        "threshold": bound,
        "final_multiplier": rows[-1]["multiplier"] if rows else rule.init().value,
        "maximum_multiplier": most if math.isfinite(most := duals.bound(rule)) else None,
        "algorithm": settings.policy.algorithm,
        "safety_test": tested,
        "bounded": bounded,
    }


def bounded_instead(
    settings: Settings, bound: float, costs: Sequence[float], prompts: Sequence[str] = ()
) -> dict[str, Any] | None:
    """What training bounded where it is not the mean cost: the name, its bound, and its value on these costs.

    prompts: that each cost is of; only a bound on every prompt's mean asks for them.
    """
    constraint, known = build.constraint(settings, bound), torch.tensor(costs, dtype=torch.float64)
    measure = constraint.measure
    if measure.words is None:
        return None
    if measure.samples > 1:
        known = torch.stack([known[[p == one for p in prompts]].mean() for one in dict.fromkeys(prompts)])
    return {"name": measure.words, "bound": constraint.threshold, "value": constraint.statistic(known[:, None])}


def _metrics(output: Path) -> list[dict[str, Any]]:
    file = output / "policy" / "metrics.jsonl"
    return list(read_metrics(file)) if file.is_file() else []


def _seconds(output: Path) -> dict[str, float]:
    found = {stage: read_done(output / stage) for stage in STAGES}
    return {stage: float(done["seconds"]) for stage, done in found.items() if done}
