"""From judged answers and the files of a run to `ReportData`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.benchmarks.base import Benchmark, Predicate, Slices
from safe_rlhf_v.evaluation.report_data import (
    Constraint,
    Example,
    ExampleAnswer,
    JudgeInfo,
    PreferenceMetrics,
    ReportData,
    Side,
)
from safe_rlhf_v.evaluation.run import Answer, differences, summarise
from safe_rlhf_v.statistics import DEFAULT, Interval, Resampling, per_prompt

HEADLINE = ("unsafe_rate", "benign_helpfulness", "over_refusal_rate", "mean_cost", "mean_reward")
MAX_POINTS, MAX_STEPS, MAX_TEXT, THUMBNAIL = 400, 600, 320, 240


def build_report(
    *,
    before: Sequence[Answer],
    after: Sequence[Answer],
    benchmark: Benchmark,
    constraint: Constraint | Mapping[str, Any],
    reward_model: PreferenceMetrics | Mapping[str, Any] | None = None,
    cost_model: PreferenceMetrics | Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    guard_rounds: Sequence[Mapping[str, Any]] = (),
    metrics: str | Path | Sequence[Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    examples: int = 8,
    notes: Sequence[str] = (),
    title: str = "Safety alignment report",
    subtitle: str = "",
    seed: int = 0,
    models: Mapping[str, str] | None = None,
    resampling: Resampling = DEFAULT,
) -> ReportData:
    """Sums up the answers of the base and the aligned policy to the SAME benchmark and joins the other parts.

    metrics: the trainer's metrics.jsonl, or its rows. seconds: of each stage; "total" is added if absent.
    settings: the resolved settings, JSON types. seed: of the training run.
    models: folder or hub id of "base", "aligned", "reward" and "cost".
    Raises ValueError where the sides answer different prompts, and pydantic.ValidationError (which names the field)
    where a number is not finite or out of its range.
    """
    judge, invites_harm, slices = benchmark.judge, benchmark.invites_harm, benchmark.slices
    rows = read_metrics(metrics) if isinstance(metrics, str | Path) else list(metrics or [])
    return ReportData.model_validate(
        {
            "base": build_side(before, invites_harm, slices, resampling=resampling),
            "aligned": build_side(after, invites_harm, slices, resampling=resampling),
            "difference": differences(before, after, invites_harm, resampling=resampling),
            "judge": JudgeInfo(name=judge.name, kind=judge.kind),
            "reward_model": reward_model,
            "cost_model": cost_model,
            "constraint": constraint,
            "guard": guard,
            "guard_rounds": list(guard_rounds),
            "trajectory": thin(rows),
            "seconds": dict(seconds or {}),
            "examples": choose_examples(before, after, invites_harm, slices, examples),
            "settings": dict(settings or {}),
            "notes": list(notes),
            "title": title,
            "subtitle": subtitle,
            "seed": seed,
            "models": dict(models or {}),
            "level": resampling.level,
        }
    )


def build_side(
    answers: Sequence[Answer],
    invites_harm: Predicate,
    slices: Slices | None = None,
    *,
    resampling: Resampling = DEFAULT,
) -> Side:
    """`summarise`, in the shape of report.json."""
    summary = summarise(answers, invites_harm, slices, resampling=resampling)
    intervals = {key: value for key, value in summary.items() if isinstance(value, Interval)}
    groups = {key: value for key, value in summary.items() if key not in intervals}
    headline = {name: intervals[name].value for name in HEADLINE if name in intervals}
    return Side(
        **headline,
        **groups,
        intervals=intervals,
        n_prompts=len({a.prompt.id for a in answers}),
        n_answers=len(answers),
        plane=plane_points(answers),
    )


def plane_points(answers: Sequence[Answer]) -> list[tuple[float, float, float]]:
    """[reward, cost, share judged unsafe] of each prompt, evenly thinned; empty where answers were not scored."""
    if any(a.reward is None or a.cost is None for a in answers):
        return []
    keys = [a.prompt.id for a in answers]
    columns = (
        per_prompt([float(a.reward or 0) for a in answers], keys),
        per_prompt([float(a.cost or 0) for a in answers], keys),
        per_prompt([a.judgement.unsafe for a in answers], keys),
    )
    chosen = _evenly(list(columns[0]), MAX_POINTS)
    return [(columns[0][key], columns[1][key], columns[2][key]) for key in chosen]


def _evenly(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


# ---------------------------------------------------------------------------------------------------- training


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl by step; of a step that a resumed run wrote twice the later row counts."""
    rows: dict[float, dict[str, float]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if "step" not in row:
                raise ValueError(f"{path}, line {number}: no key 'step'; is this the trainer's metrics.jsonl?")
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def thin(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """At most MAX_STEPS rows, evenly chosen, numbers only."""
    kept = _evenly(list(rows), MAX_STEPS)
    return [
        {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)} for row in kept
    ]


# ---------------------------------------------------------------------------------------------------- examples


def choose_examples(
    before: Sequence[Answer], after: Sequence[Answer], invites_harm: Predicate, slices: Slices | None, count: int
) -> list[Example]:
    """`count` prompts, chosen by rule and not by hand: in turn one of each kind of outcome, categories varied.

    Failures come before successes of the same standing, so that a page with few examples still shows them.
    """
    first, second = ({a.prompt.id: a for a in reversed(side)} for side in (before, after))
    buckets: dict[str, list[str]] = {
        "was unsafe, is safe": [], "still unsafe": [], "harmless, answered": [],
        "became unsafe": [], "harmless, refused": [], "safe before and after": [], "of unknown intent, safe": [],
    }  # fmt: skip
    for key in sorted(first.keys() & second.keys()):
        buckets[_outcome(first[key], second[key], invites_harm)].append(key)
    ordered = {why: _vary([second[key] for key in keys]) for why, keys in buckets.items()}
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(ordered.values()):
        chosen += [(why, answers.pop(0).prompt.id) for why, answers in ordered.items() if answers]
    order = list(buckets)
    chosen = sorted(chosen[:count], key=lambda item: order.index(item[0]))
    return [_example(why, first[key], second[key], invites_harm, slices) for why, key in chosen]


def _outcome(before: Answer, after: Answer, invites_harm: Predicate) -> str:
    if after.judgement.unsafe:
        return "still unsafe" if before.judgement.unsafe else "became unsafe"
    if before.judgement.unsafe:
        return "was unsafe, is safe"
    harm = invites_harm(after.prompt)
    if harm is None:
        return "of unknown intent, safe"
    if harm:
        return "safe before and after"
    return "harmless, refused" if after.judgement.refusal else "harmless, answered"


def _vary(answers: list[Answer]) -> list[Answer]:
    """Reordered so that categories take turns."""
    seen: dict[str | None, int] = {}
    ranks = []
    for answer in answers:
        seen[answer.prompt.category] = seen.get(answer.prompt.category, 0) + 1
        ranks.append(seen[answer.prompt.category])
    return [
        answer for _, _, answer in sorted(zip(ranks, range(len(answers)), answers, strict=True), key=lambda x: x[:2])
    ]


def _example(why: str, before: Answer, after: Answer, invites_harm: Predicate, slices: Slices | None) -> Example:
    prompt = after.prompt
    return Example(
        why=why,
        question=shorten(prompt.text),
        invites_harm=invites_harm(prompt),
        category=prompt.category,
        slices=list(slices(prompt)) if slices else [],
        picture=thumbnail(prompt),
        before=_example_answer(before),
        after=_example_answer(after),
    )


def _example_answer(answer: Answer) -> ExampleAnswer:
    judged = answer.judgement
    return ExampleAnswer(
        text=shorten(answer.text),
        unsafe=judged.unsafe,
        severity=judged.severity,
        helpful_rate=judged.helpful_rate,
        harmless_rate=judged.harmless_rate,
        refusal=judged.refusal,
        reward=answer.reward,
        cost=answer.cost,
    )


def shorten(text: str, most: int = MAX_TEXT) -> str:
    """At most `most` characters, saying how much was cut."""
    text = text.strip()
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most} more characters)"


def thumbnail(prompt: Prompt) -> str | None:
    """The first picture of a prompt as a small PNG data URI; None without pictures."""
    if not prompt.images:
        return None
    image = prompt.images[0].load().copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
