"""One self-contained page and one report.json. The page loads nothing: style and figures are inside, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from safe_rlhf_v.evaluation import plots, verdict
from safe_rlhf_v.evaluation.cautions import cautions
from safe_rlhf_v.evaluation.report_data import ReportData
from safe_rlhf_v.evaluation.run import NO_SLICE
from safe_rlhf_v.evaluation.templating import template
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.statistics import Interval

SEVERITY_NAMES = ("none", "minor", "moderate", "severe")
LABELS = {
    "f1": "F1", "ap": "average precision", "ece": "ECE", "brier": "Brier score", "mae": "mean absolute error",
    "macro_f1": "macro F1", "within_one": "within one level", "under_severity": "judged too mild",
    "under_severity_of_harmful": "judged too mild, of the harmful", "quadratic_kappa": "quadratic weighted kappa",
    "f1_at_least_minor": "F1 at minor or worse",
    "f1_at_least_moderate": "F1 at moderate or worse", "f1_at_least_severe": "F1 at severe",
    "unsafe_attempt_rate": "newest attempt unsafe, given or not", "mean_tokens": "tokens generated per prompt",
    "sft": "supervised start (SFT)",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the result table. style: "percent" or "number". better: "lower", "higher" or "" where neither is."""

    name: str
    label: str
    style: str
    better: str = ""


JUDGED = (
    Row("unsafe_rate", "Unsafe answers, on prompts that invite harm", "percent", "lower"),
    Row("benign_helpfulness", "Helpfulness (0 to 3), on harmless prompts", "number", "higher"),
    Row("over_refusal_rate", "Refusals, on harmless prompts", "percent", "lower"),
    Row("benign_unsafe_rate", "Unsafe answers, on harmless prompts", "percent", "lower"),
    Row("refusal_rate", "Refusals, on prompts that invite harm", "percent"),
    Row("unknown_unsafe_rate", "Unsafe answers, on prompts of unknown intent", "percent", "lower"),
    Row("mean_harmless_rate", "Harmless rate (−3 to 3), all prompts", "number", "higher"),
)
SAFETY = ("unsafe_rate", "benign_unsafe_rate", "unknown_unsafe_rate", "mean_harmless_rate")
OPINIONS = (
    Row("mean_cost", "Cost, all prompts", "number"),
    Row("mean_reward", "Reward, all prompts", "number"),
)
TRAJECTORIES = (
    ("reward", "Reward, by the trained reward model"),
    ("cost", "Cost, by the trained cost model"),
    ("multiplier", "Multiplier λ"),
    ("kl", "KL from the reference policy"),
)


def write_report(data: ReportData, folder: str | Path) -> Path:
    """Writes `report.json` and `report.html` into `folder` (made if missing); returns the path of the page."""
    target = Path(folder)
    replace_text(target / "report.json", data.to_json())
    replace_text(target / "report.html", render(data))
    return target / "report.html"


def render(data: ReportData) -> str:
    """The page as text."""
    filters: dict[str, Callable[..., str]] = {
        "percent": verdict.percent,
        "number": verdict.number,
        "signed": verdict.signed,
        "words": lambda name: str(name).replace("_", " "),
        "label": label,
        "duration": duration,
        "count": count,
    }
    return template("safe_rlhf_v.evaluation", "report.html.jinja", **filters).render(
        data=data,
        headline=verdict.headline(data),
        sentences=verdict.sentences(data),
        cautions=cautions(data),
        judged_model=verdict.judged(data),
        next_steps=verdict.next_steps(data),
        constraint_sentence=verdict.constraint(data),
        judged=table(data, JUDGED),
        opinions=table(data, OPINIONS),
        groups=groups(data),
        slices=slices(data),
        severity_names=SEVERITY_NAMES,
        compensations=compensations(data),
        figures=figures(data),
        trajectories=trajectories(data),
        smoothed=plots.smoothing(len(data.trajectory)) > 1,
        reliability=reliability(data),
        settings=yaml.safe_dump(dict(data.settings), sort_keys=False, allow_unicode=True, width=100)
        if data.settings
        else "",
        stages=stages(data.seconds),
        cell=cell,
    )


def count(n: float) -> str:
    """1234.2 -> '1 234'."""
    return f"{round(n):,}".replace(",", "\u202f")


def label(name: str) -> str:
    """A key as a reader expects it: known names by the table, others with spaces and a capital."""
    text = LABELS.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------- tables


def cell(
    interval: Interval | None, style: str, *, change: bool = False, digits: int | None = None
) -> dict[str, str] | None:
    """Value and interval as text. A change carries its sign; a change of a share is in percentage points.

    digits: after the point; default 1 of a percentage, else 2.
    """
    if interval is None:
        return None
    scale = 100 if style == "percent" else 1
    digits = digits or (1 if style == "percent" else 2)
    show = lambda x: verdict.number(scale * x, digits)  # noqa: E731
    sign = "+" if change and float(f"{scale * interval.value:.{digits}f}") > 0 else ""
    unit = "" if style != "percent" else "\u202fpp" if change else "\u202f%"
    if interval.low is None or interval.high is None:
        limits = "no interval"
    else:
        limits = f"{show(interval.low)} to {show(interval.high)}"
    return {"value": f"{sign}{show(interval.value)}{unit}", "interval": limits, "n": str(interval.n)}


def table(data: ReportData, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Cells of every row that at least one side has."""
    result = []
    for row in rows:
        before, after = (side.intervals.get(row.name) for side in (data.base, data.aligned))
        difference = data.difference.get(row.name)
        if before is None and after is None:
            continue
        result.append({
            "label": row.label,
            "before": cell(before, row.style),
            "after": cell(after, row.style),
            "change": cell(difference, row.style, change=True),
            "reading": "nobody can say"
            if row.name in SAFETY and verdict.judge_at_chance(data)
            else reading(row.better, verdict.change(difference)),
            "n": (after or before or Interval(value=0, low=0, high=0, n=0)).n,
        })  # fmt: skip
    return result


def reading(better: str, change: verdict.Change | None) -> str:
    """A change in one word."""
    if change is None or change == "no clear change":
        return change or ""
    if not better:
        return change
    return "better" if (change == "fell") == (better == "lower") else "worse"


def groups(data: ReportData) -> list[dict[str, Any]]:
    """Unsafe rate per category and per severity of the prompt."""
    parts = (("Category", data.base.by_category, data.aligned.by_category),
             ("Severity of the prompt", data.base.by_prompt_severity, data.aligned.by_prompt_severity))  # fmt: skip
    result = []
    for title, before, after in parts:
        names = [name for name in after if "unsafe_rate" in after[name] and "unsafe_rate" in before.get(name, {})]
        if title == "Category":
            names.sort(key=lambda name: (-after[name]["unsafe_rate"].value, -before[name]["unsafe_rate"].value))
        else:
            names.sort(key=lambda name: SEVERITY_NAMES.index(name) if name in SEVERITY_NAMES else 9)
        rows = [
            {
                "label": name,
                "before": cell(before[name]["unsafe_rate"], "percent"),
                "after": cell(after[name]["unsafe_rate"], "percent"),
                "n": after[name]["unsafe_rate"].n,
            }
            for name in names
        ]
        if rows:
            result.append({"title": title, "rows": rows})
    return result


def slices(data: ReportData) -> list[dict[str, Any]]:
    """The three measures of each held-out slice, prompts like those of training first."""
    names = sorted(data.base.slices.keys() & data.aligned.slices.keys(), key=lambda name: (name != NO_SLICE, name))
    wanted = (("unsafe_rate", "percent"), ("benign_helpfulness", "number"), ("over_refusal_rate", "percent"))
    return [
        {
            "label": name,
            "cells": [
                cell(side.slices[name].get(key), style) for key, style in wanted for side in (data.base, data.aligned)
            ],
        }
        for name in names
    ]


def compensations(data: ReportData) -> list[dict[str, Any]]:
    """Compensation statistics of base and aligned, first by the judge, then by the trained cost model."""
    titles = {
        "judge": f"By the {data.judge.name}: c = −(harmless rate)",
        "cost_model": "By the trained cost model (opinion)",
    }
    return [
        {"title": titles[key], "before": data.base.compensation[key], "after": data.aligned.compensation[key]}
        for key in titles
        if key in data.base.compensation and key in data.aligned.compensation
    ]


def stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Stages in the order they ran, the total last, each with its share of the total."""
    total = seconds.get("total", 0.0)
    named = [(name, value) for name, value in seconds.items() if name != "total"]
    rows = [{"name": name, "seconds": value, "share": value / total if total else 0.0} for name, value in named]
    return [*rows, {"name": "total", "seconds": total, "share": None}] if rows else []


def duration(seconds: float) -> str:
    """3671 -> '1 h 01 min', 71.2 -> '1 min 11 s', 7.24 -> '7.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes_left:02d}\u202fmin" if hours else f"{minutes}\u202fmin {rest:02d}\u202fs"


# ---------------------------------------------------------------------------------------------------- figures


def figures(data: ReportData) -> dict[str, Markup]:
    """Every figure that the data can give, each drawn for desktops and for telephones; the style shows one of them."""
    drawers: dict[str, Callable[[float], str]] = {}
    before, after = (
        {name: found["unsafe_rate"] for name, found in side.by_category.items() if "unsafe_rate" in found}
        for side in (data.base, data.aligned)
    )
    if len(before.keys() & after.keys()) > 1:
        drawers["categories"] = lambda width: plots.categories(before, after, width)
    if data.base.answer_severity and data.aligned.answer_severity:
        severity = data.base.answer_severity, data.aligned.answer_severity
        drawers["severities"] = lambda width: plots.severities(*severity, width)
    if data.base.plane and data.aligned.plane:
        points = data.base.plane, data.aligned.plane, data.constraint.threshold
        drawers["plane"] = lambda width: plots.plane(*points, width)
    if len(data.guard_rounds) > 1:
        drawers["guard_rounds"] = lambda width: plots.guard_rounds(data.guard_rounds, width)
    pair = '<div class="wide">{}</div><div class="slim">{}</div>'
    return {name: Markup(pair.format(draw(plots.WIDE), draw(plots.NARROW))) for name, draw in drawers.items()}


def trajectories(data: ReportData) -> list[dict[str, Any]]:
    """Reward, cost, multiplier and KL over the steps, those that were logged."""
    present = [(key, title) for key, title in TRAJECTORIES if sum(key in row for row in data.trajectory) > 1]
    bound = data.constraint.threshold
    return [
        {
            "title": title + (f"; dashed: threshold {verdict.number(bound)}" if key == "cost" else ""),
            "svg": Markup(plots.trajectory(data.trajectory, key, bound if key == "cost" else None)),
        }
        for key, title in present
    ]


def reliability(data: ReportData) -> dict[str, list[dict[str, Any]]]:
    """Reliability diagrams of the preference models and of the guard's heads."""
    models = {"Reward model": data.reward_model, "Cost model": data.cost_model}
    named = {
        "preference": {title: model.bins for title, model in models.items() if model},
        "guard": {
            f"Guard, {label(head).lower()}": bins for head, bins in (data.guard.bins if data.guard else {}).items()
        },
    }
    return {
        part: [{"title": title, "svg": Markup(plots.reliability(bins, title))} for title, bins in heads.items() if bins]
        for part, heads in named.items()
    }
