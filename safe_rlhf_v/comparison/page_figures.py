"""The figures of the page: which the data can give, and what is drawn in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup

from safe_rlhf_v.comparison import plots as draw
from safe_rlhf_v.comparison.comparison import FIGURES, Comparison
from safe_rlhf_v.comparison.crossed import Estimate
from safe_rlhf_v.comparison.page_rows import bound_lines
from safe_rlhf_v.comparison.plots import START
from safe_rlhf_v.comparison.runs import REFERENCE, gaps, multipliers
from safe_rlhf_v.evaluation import plots

PAIRED = ("unsafe_rate", "helpfulness")


def figures(comparison: Comparison, methods: dict[str, str]) -> dict[str, Markup]:
    """Every figure that the data can give, drawn for desktops and for telephones."""
    style = draw.look(list(comparison.methods.values()))
    drawers: dict[str, Callable[[float], str]] = {}
    points = {t: p for m, t in methods.items() if (p := _point(comparison, m))}
    start = _point(comparison, REFERENCE)
    if points and start:
        drawers["frontier"] = lambda width: draw.frontier(points, start, style, width)
    lines = {comparison.methods[m]: found for m, found in bound_lines(comparison).items()}
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


def multiplier_panels(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
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


def gap_panels(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
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
