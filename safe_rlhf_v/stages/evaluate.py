"""The report of a run: the aligned model against its start, judged by the known truth or by the trained models."""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guard.classifier import Guard
from guard.regenerate import GenerativePolicy, regenerate, safety_by_round
from safe_rlhf_v.config import GuardSection, Settings
from safe_rlhf_v.console import plain
from safe_rlhf_v.evaluation import Benchmark, Resampling, benchmark_of, build_report, collect, write_report
from safe_rlhf_v.evaluation.judges import Severities, without_guard
from safe_rlhf_v.evaluation.preference import read_preference
from safe_rlhf_v.stages.answering import Answering, Scoring
from safe_rlhf_v.stages.data import comparisons, readable
from safe_rlhf_v.stages.folder import LEFT_OUT, read_done, require_writable
from safe_rlhf_v.stages.models import device, judges, start_model, trained
from safe_rlhf_v.stages.report_constraint import constraint_of, is_of, measured_of, metrics_of
from safe_rlhf_v.stages.report_notes import leakage_notes, not_judged
from safe_rlhf_v.stages.stages import STAGES
from safe_rlhf_v.stages.threshold import threshold
from safe_rlhf_v.training.encode import listing, thorough, write_left_out
from safe_rlhf_v.vlm.kind import require_answering

HEADLINE = ("unsafe_rate", "benign_helpfulness", "over_refusal_rate", "mean_cost", "mean_reward")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Write report.html, report.json and left_out.jsonl into the model's `report_folder`.

    Returns {"headline": ..., "report": path of the page, "model": the judged one, "usual": it is the run's policy}.
    """
    start, output, section, seed = time.monotonic(), Path(settings.output_dir), settings.evaluation, settings.seed
    require_writable(output)
    models = {kind.removesuffix("_model"): path for kind, path in judges(output, settings.policy, "policy").items()}
    models["aligned"] = trained(output, "policy", section.model, "evaluation.model")
    given = section.base
    models["base"] = require_answering(given, "evaluation.base") if given else start_model(settings.model, output)
    folder, listed = report_folder(models["aligned"], output)
    held_out = comparisons(settings.data, "evaluation")
    scorer = Scoring(models["reward"], models["cost"], settings.model, settings.generation.batch_size)
    guard = _guard(settings.guard, output, settings.model.dtype)
    benchmark = benchmark_of(held_out.prompts(), scorer, _severities(guard))
    aligned, base = (Answering(models[side], settings.model, settings.generation) for side in ("aligned", "base"))
    with listing(listed):
        prompts, left_out = readable(held_out, thorough(base.encoder), listed=listed)
    write_left_out(listed, left_out)
    benchmark, answers = replace(benchmark, prompts=prompts), []
    for name, model in (("base", base), ("aligned", aligned)):
        torch.manual_seed(seed)
        count, batch = section.samples, model.batch_size
        answers.append(collect(model, benchmark, count, scorer=scorer, batch_size=batch, label=name))
    rounds = _rounds(guard, base, benchmark, settings.guard.max_rounds, seed) if section.guard_rounds else []
    of_policy = not (is_of("direct", output, section.model) or is_of("iterative", output, section.model))
    data = build_report(
        before=answers[0],
        after=answers[1],
        benchmark=benchmark,
        constraint=constraint_of(settings, threshold(settings.policy, models["cost"]), answers[1]),
        reward_model=read_preference(Path(models["reward"]), "reward"),
        cost_model=read_preference(Path(models["cost"]), "cost"),
        guard=measured_of(output / "guard").get("evaluation"),
        guard_rounds=rounds,
        metrics=metrics_of(output) if of_policy else [],
        seconds=_seconds(output) | {"evaluation": round(time.monotonic() - start, 1)},
        settings=settings.model_dump(mode="json"),
        examples=section.examples,
        notes=leakage_notes(output, settings.data.path, prompts) + not_judged(rounds),
        subtitle=f"{settings.model.path} on {settings.data.path}",
        seed=seed,
        models={side: models[side] for side in ("base", "aligned", "reward", "cost")},
        resampling=Resampling(level=section.confidence, draws=section.bootstrap, seed=seed),
    )
    page = write_report(data, folder)
    headline = {side: {name: getattr(getattr(data, side), name) for name in HEADLINE} for side in ("base", "aligned")}
    of = {"model": models["aligned"], "usual": folder == output}
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


def _guard(section: GuardSection, output: Path, dtype: str) -> Guard | None:
    """The guard that the section names, else the one trained; None where there is none."""
    folder = section.path or str(output / "guard")
    if section.path is None and not read_done(Path(folder)):
        return None
    return Guard.from_pretrained(folder, policy=section.policy, device=device(), dtype=dtype)


def _severities(guard: Guard | None) -> Severities | None:
    """The guard's grades of answers; None where it cannot judge any."""
    if guard is None or not guard.can_judge("response"):
        return None
    return lambda prompts, texts: [verdict.severity for verdict in guard.judge(prompts, texts)]


def _rounds(guard: Guard | None, base: Answering, benchmark: Benchmark, most: int, seed: int) -> list[dict[str, Any]]:
    """Safety of the start model behind the guard after 0, 1, ... `most` rounds, by a judge that is not the guard.

    On prompts that invite harm, with what the guard refuses of harmless ones beside it; the guard sees answers alone,
    so that round 0 is the model as it is.
    """
    if guard is None or base.sampling.temperature == 0:
        return []
    harmful = [p for p in benchmark.prompts if benchmark.invites_harm(p)]
    if not harmful or not guard.can_judge("response"):
        why = "no prompt is known to invite harm" if not harmful else "the guard was not trained to judge responses"
        plain(f"no rounds of the guard: {why}")
        return []
    torch.manual_seed(seed)
    policy = GenerativePolicy(base, base.encoder, base.sampling, base.batch_size)
    judge = without_guard(benchmark.judge)
    harmless = [p for p in benchmark.prompts if benchmark.invites_harm(p) is False]
    transcripts, needless = (regenerate(policy, guard, some, most, judge_query=False) for some in (harmful, harmless))
    return safety_by_round(transcripts, lambda prompt, text: judge([prompt], [text])[0].unsafe, most, needless)


def _seconds(output: Path) -> dict[str, float]:
    found = {stage: read_done(output / stage) for stage in STAGES}
    return {stage: float(done["seconds"]) for stage, done in found.items() if done}
