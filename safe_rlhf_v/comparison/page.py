"""The page of a comparison: one self-contained compare.html, and compare.json with the findings."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from safe_rlhf_v.comparison import plots as draw
from safe_rlhf_v.comparison.claims import ALPHA, Finding
from safe_rlhf_v.comparison.comparison import (
    FIGURES,
    REFERENCE,
    TAU,
    Comparison,
    compensations,
    gaps,
    multipliers,
)
from safe_rlhf_v.comparison.crossed import Estimate, crossed
from safe_rlhf_v.evaluation import plots, verdict
from safe_rlhf_v.evaluation.report import cell, duration
from safe_rlhf_v.evaluation.statistics import Interval
from safe_rlhf_v.files import replace_text

TABLE = ("unsafe_rate", "prompts_left_unsafe", "helpfulness", "over_refusal_rate", "mean_cost")
PAIRED = ("unsafe_rate", "helpfulness")
EFFORT = ("seconds", "sampled", "pairs", "steps")
START = "start model"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed, with the last lines of its log."""

    name: str
    why: str
    log: str


@dataclass(frozen=True, kw_only=True)
class PageData:
    """Everything the page shows. bound: requested fall of the mean cost at which methods are compared. budget:
    responses each on-policy method may draw. samples: answers a prompt when measuring. control: what "as helpful" is
    held against, the start model or imitation alone. imitate_alone: arms that are a control themselves, never the one
    to take. settings: the YAML."""

    comparison: Comparison
    findings: Sequence[Finding]
    failures: Sequence[Failure] = ()
    bound: float | None = None
    budget: int | None = None
    samples: int = 1
    control: str = REFERENCE
    imitate_alone: Sequence[str] = ()
    settings: str = ""


def write_page(data: PageData, folder: Path) -> Path:
    """compare.html and compare.json into the folder; returns the page's path."""
    replace_text(folder / "compare.json", json.dumps(to_json(data), indent=1, allow_nan=False) + "\n")
    replace_text(folder / "compare.html", render(data))
    return folder / "compare.html"


def to_json(data: PageData) -> dict[str, Any]:
    """Findings and figures, for programs: {"findings": [...], "methods": {name: {figure: estimate}}, "failures"}."""
    found = data.comparison
    names = [REFERENCE, *(m for m in found.methods if found.of(m))]
    figures = {n: {f: asdict(e) for f in FIGURES if (e := found.estimate(n, f))} for n in names}
    findings = [asdict(f) | {"claim": f.claim.model_dump()} for f in data.findings]
    return {"findings": findings, "methods": figures, "failures": [asdict(f) for f in data.failures]}


def render(data: PageData) -> str:
    """The page as text."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("safe_rlhf_v.comparison"), PackageLoader("safe_rlhf_v.evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": verdict.number, "duration": duration, "count": _count}
    environment.filters |= {"p": p_value, "percent": verdict.percent}
    comparison = data.comparison
    methods = {m: t for m, t in comparison.methods.items() if comparison.of(m)}
    return environment.get_template("compare.html.jinja").render(
        data=data,
        reference=comparison.reference.info,
        prompts=len(comparison.reference.prompts),
        seeds=sorted({r.info.seed for r in comparison.runs}),
        methods=methods,
        headline=headline(data, methods),
        sentences=sentences(data, methods),
        columns=[FIGURES[f].label for f in TABLE],
        rows=[_row(comparison, m, t) for m, t in {REFERENCE: START, **methods}.items()],
        claims=[_claim(f) for f in data.findings],
        figures=_figures(comparison, methods),
        bounds=_bound_rows(comparison),
        compensation=_compensation_rows(comparison, methods),
        multipliers=_multiplier_panels(comparison, methods),
        gaps=_gap_panels(comparison, methods),
        effort=_effort(comparison, methods),
        infeasible=[r.info for r in comparison.runs if not r.info.found],
        alpha=ALPHA,
        tau=TAU,
    )


def _count(n: float) -> str:
    return f"{round(n):,}".replace(",", "\u202f")


def p_value(p: float | None) -> str:
    """0.0312 -> '0.031', 0.00002 -> '< 0.001'."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------------------------------------------- in words


def headline(data: PageData, methods: dict[str, str]) -> str:
    """How many claims hold."""
    count = {v: sum(f.verdict == v for f in data.findings) for v in ("holds", "does not hold", "not decided")}
    if not data.findings:
        return f"{len(methods)} methods, side by side"
    right, wrong = count["holds"], count["does not hold"]
    words = f"{right} hold{'s' * (right == 1)}, {wrong} do{'es' * (wrong == 1)} not"
    rest = f", {count['not decided']} undecided" if count["not decided"] else ""
    return f"Of {len(data.findings)} claims {words}{rest}."


def sentences(data: PageData, methods: dict[str, str]) -> list[str]:
    """Which method to take, by rule: the safest of those whose helpfulness is not clearly below the control's."""
    comparison = data.comparison
    arms = [m for m in methods if m not in data.imitate_alone]
    rates = {m: e for m in arms if (e := comparison.estimate(m, "unsafe_rate"))}
    control = f"the {START}" if data.control == REFERENCE else methods.get(data.control, data.control)
    start = comparison.estimate(REFERENCE, "unsafe_rate")
    if not rates or start is None:
        return []
    useful = [m for m in rates if not _clearly_less_helpful(comparison, m, data.control)]
    best = min(useful or rates, key=lambda m: rates[m].value)
    choice = f"of the methods that are not clearly less helpful than {control}" if useful else "of all methods"
    found = [
        f"{methods[best]} has the lowest unsafe rate {choice}: {_percent(rates[best])}; the start model has "
        f"{_percent(start)}."
    ]
    if useful and len(useful) < len(rates):
        less = "; ".join(methods[m] for m in rates if m not in useful)
        found.append(f"Clearly less helpful than {control} on harmless prompts: {less}.")
    rivals = [m for m in useful if m != best and not _differs(comparison, m, best)]
    if rivals:
        names = "; ".join(methods[m] for m in rivals)
        found.append(f"Not clearly less safe than it: {names}.")
    return found


def _percent(e: Estimate) -> str:
    limits = "" if e.low is None or e.high is None else f" ({verdict.percent(e.low)} to {verdict.percent(e.high)})"
    return verdict.percent(e.value) + limits


def _clearly_less_helpful(comparison: Comparison, method: str, control: str) -> bool:
    table = comparison.difference(method, control, "helpfulness")
    found = crossed(table) if table is not None else None
    return found is not None and found.high is not None and found.high < 0


def _differs(comparison: Comparison, method: str, other: str) -> bool:
    table = comparison.difference(method, other, "unsafe_rate")
    found = crossed(table) if table is not None else None
    return found is not None and found.p is not None and found.p <= ALPHA


# ---------------------------------------------------------------------------------------------------- tables


def as_interval(e: Estimate) -> Interval:
    """For `report.cell`."""
    return Interval(value=e.value, low=e.low, high=e.high, n=e.prompts)


def _cell(e: Estimate | None, style: str, *, change: bool = False) -> dict[str, str] | None:
    return cell(as_interval(e), style, change=change) if e else None


def _row(comparison: Comparison, method: str, title: str) -> dict[str, Any]:
    """A method's line: its figures, and the paired difference to the start model of the first two that matter."""
    cells = [_cell(comparison.estimate(method, f), FIGURES[f].style) for f in TABLE]
    return {"title": title, "cells": cells, "seeds": len(comparison.of(method))}


def _claim(finding: Finding) -> dict[str, Any]:
    claim = finding.claim
    costs = claim.kind in ("smallest_bound", "largest_bound", "bound_error", "slope", "slack")
    style = "number" if costs else FIGURES[claim.figure].style
    label = {
        "smallest_bound": "achieved against requested fall of the mean cost, at the smallest bound",
        "largest_bound": "achieved against requested fall of the mean cost, at the largest bound",
        "bound_error": "distance of the achieved from the requested fall of the mean cost",
        "slope": "distance from 1 of the slope of achieved on requested fall of the mean cost",
        "slack": "distance of achieved from requested improvement, last iteration against first",
    }.get(claim.kind, FIGURES[claim.figure].label)
    label += {"equal_cost": ", at equal mean cost", "equal_reward": ", at equal mean reward"}.get(claim.kind, "")
    show = verdict.percent if style == "percent" else verdict.number
    sides = [show(x) for x in (finding.left, finding.right) if x is not None]
    return {
        "paper": claim.paper,
        "text": claim.text,
        "figure": label,
        "sides": " against ".join(sides),
        "difference": _cell(finding.difference, style, change=True),
        "p": p_value(finding.p_adjusted),
        "verdict": finding.verdict,
        "why": finding.why,
    }


def _bound_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Requested and achieved, a line a method and bound."""
    rows = []
    for method, points in _bound_lines(comparison).items():
        for bound, achieved in points:
            table = np.stack(list(comparison.improvement(method, bound).values()))
            unsafe = comparison.estimate(method, "unsafe_rate", requested=bound)
            error = _cell(crossed(table - bound), "number", change=True)
            row = {"title": comparison.methods[method], "bound": bound, "error": error, "seeds": achieved.seeds}
            rows.append(row | {"achieved": _cell(achieved, "number"), "unsafe": _cell(unsafe, "percent")})
    return rows


def _bound_lines(comparison: Comparison) -> dict[str, list[tuple[float, Estimate]]]:
    """Method -> (requested, achieved), of methods with a model at two bounds or more, whichever these are."""
    lines = {}
    for method in comparison.methods:
        tables = {b: t for b in comparison.bounds(method) if (t := comparison.improvement(method, b))}
        if len(tables) > 1:
            lines[method] = [(b, crossed(np.stack(list(t.values())))) for b, t in tables.items()]
    return lines


def _compensation_rows(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    for method, title in {REFERENCE: START, **methods}.items():
        found = compensations(comparison.of(method))
        if found:
            left = _cell(comparison.estimate(method, "prompts_left_costly"), "percent")
            rows.append({"title": title, **found, "left": left})
    return rows


def _effort(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    """Mean seconds, responses drawn, pairs read and steps of a method's runs at the main bound."""
    rows: list[dict[str, Any]] = []
    for method, title in methods.items():
        infos = [r.info for r in comparison.of(method)]
        means = {name: float(np.mean([getattr(i, name) for i in infos])) for name in EFFORT}
        rows.append({"title": title, "stage": infos[0].stage, "runs": len(infos), **means})
    longest = max((float(row["seconds"]) for row in rows), default=0.0)
    return [row | {"share": float(row["seconds"]) / longest if longest else 0.0} for row in rows]


# ---------------------------------------------------------------------------------------------------- figures


def _figures(comparison: Comparison, methods: dict[str, str]) -> dict[str, Markup]:
    """Every figure that the data can give, drawn for desktops and for telephones."""
    style = draw.look(list(comparison.methods.values()))
    drawers: dict[str, Callable[[float], str]] = {}
    points = {t: p for m, t in methods.items() if (p := _point(comparison, m))}
    start = _point(comparison, REFERENCE)
    if points and start:
        drawers["frontier"] = lambda width: draw.frontier(points, start, style, width)
    lines = {comparison.methods[m]: found for m, found in _bound_lines(comparison).items()}
    if lines:
        drawers["bounds"] = lambda width: draw.bounds(lines, style, width)
    for figure, name in (("prompts_left_unsafe", "compensation"), ("prompts_left_costly", "compensation_cost")):
        curves = _curves(comparison, methods, figure)
        if len(curves) > 1:
            label = FIGURES[figure].label
            drawers[name] = functools.partial(draw.compensation, curves, style, name.replace("_", "-"), label)
    pair = '<div class="wide">{}</div><div class="slim">{}</div>'
    return {n: Markup(pair.format(d(plots.WIDE), d(plots.NARROW))) for n, d in drawers.items()}


def _point(comparison: Comparison, method: str) -> tuple[Estimate, Estimate] | None:
    unsafe, helpful = (comparison.estimate(method, f) for f in PAIRED)
    return (unsafe, helpful) if unsafe and helpful else None


def _curves(comparison: Comparison, methods: dict[str, str], figure: str) -> dict[str, list[tuple[Estimate, Estimate]]]:
    """Title -> (mean cost, share of prompts) at each bound of the method, the start model included."""
    curves = {}
    for method, title in {REFERENCE: START, **methods}.items():
        swept: list[float | None] = [b for b in comparison.bounds(method) if comparison.of(method, requested=b)]
        found = []
        for bound in swept or [None]:
            cost, left = (comparison.estimate(method, f, requested=bound) for f in ("mean_cost", figure))
            if cost and left:
                found.append((cost, left))
        if found:
            curves[title] = found
    return curves


def _multiplier_panels(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    """A panel for each method and constraint whose multiplier moves, a line a seed."""
    panels: list[dict[str, Any]] = []
    for method, title in methods.items():
        by_name: dict[str, list[list[tuple[float, float]]]] = {}
        for run in comparison.of(method):
            for name, points in multipliers(run).items():
                by_name.setdefault(name, []).append(_thin(points))
        for name, series in by_name.items():
            if len({value for points in series for _, value in points}) > 1:
                slug = f"multiplier-{len(panels)}"
                panels.append({"title": f"{title}{': ' * bool(name)}{name}", "svg": Markup(draw.lines(slug, series))})
    return panels


def _thin(points: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    return points if len(points) <= most else [points[int(i)] for i in np.linspace(0, len(points) - 1, most)]


def _gap_panels(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    """A panel for each method whose runs log a primal-dual gap; the shade is the runs' own interval."""
    panels: list[dict[str, Any]] = []
    for method, title in methods.items():
        found = [g for run in comparison.of(method) if (g := gaps(run))]
        if found:
            series = [[(step, gap) for step, gap, _, _ in g] for g in found]
            bands = [[(s, low, high) for s, _, low, high in g if low is not None and high is not None] for g in found]
            svg = draw.lines(f"gap-{len(panels)}", series, 0.0, [b for b in bands if b], marks=True)
            panels.append({"title": title, "svg": Markup(svg)})
    return panels
