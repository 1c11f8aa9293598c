"""Figures of a comparison, drawn with the helpers of plots.py: each method has a colour AND a mark, and its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from safe_rlhf_v.comparison.crossed import Estimate
from safe_rlhf_v.evaluation.plots import AFTER, INK, METHODS, MUTED, PAPER, PERCENT, new_axes, to_svg

MARKS = "oDs^vP*Xphd<>"
DASH = (0, (5, 3))
START = "start model"


def look(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, mark); the colours come round after eight, the marks after thirteen."""
    return {name: (METHODS[i % len(METHODS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}


def frontier(
    points: Mapping[str, tuple[Estimate, Estimate]],
    reference: tuple[Estimate, Estimate],
    style: Mapping[str, tuple[str, str]],
    width: float,
) -> str:
    """Helpfulness (up) against unsafe rate (right) of each method, both with intervals; up and left is what is wanted.

    points: title -> (unsafe rate, helpfulness).
    """
    right = _margin([*points, START])
    height = _height(1.6 + 0.34 * width, len(points) + 1)
    figure, axes = new_axes(width, height, left=0.5, right=right, top=0.3, bottom=0.5)
    everything = {START: reference, **points}
    for title, (unsafe, helpful) in everything.items():
        colour, mark = style.get(title, (MUTED, "o"))
        _cross(axes, unsafe, helpful, colour)
        face = PAPER if title == START else colour
        axes.plot(
            unsafe.value,
            helpful.value,
            mark,
            color=colour,
            ms=7.5,
            mec=colour if face == PAPER else PAPER,
            mfc=face,
            zorder=4,
        )
    axes.margins(0.06)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("unsafe answers →", loc="right")
    axes.set_title("↑ helpfulness on harmless prompts", loc="left", fontsize=10, color=MUTED)
    ends = {t: (u.value, h.value, *style.get(t, (MUTED, "o"))) for t, (u, h) in everything.items()}
    _name(axes, ends)
    return to_svg(figure, f"frontier-{width:.0f}", "Helpfulness against unsafe rate of each method, with intervals")


def _margin(titles: Sequence[str]) -> float:
    """Inches that the longest name and its mark need at the right."""
    return 0.5 + 0.078 * max(len(t) for t in titles)


LINE = 0.19
"""Inches of a name in the column."""


def _height(least: float, names: int) -> float:
    """Inches of a figure whose column of names has so many, margins included."""
    return max(least, 0.8 + LINE * names)


def _cross(axes: Axes, x: Estimate, y: Estimate, colour: str) -> None:
    if x.low is not None and x.high is not None:
        axes.plot([x.low, x.high], [y.value, y.value], color=colour, lw=1.4, alpha=0.5, solid_capstyle="butt")
    if y.low is not None and y.high is not None:
        axes.plot([x.value, x.value], [y.low, y.high], color=colour, lw=1.4, alpha=0.5, solid_capstyle="butt")


def _name(axes: Axes, ends: Mapping[str, tuple[float, float, str, str]], most_lines: int = 40) -> None:
    """Marks and names in a column right of the axes, in the order of their points' heights.

    ends: title -> (x, y, colour, mark). A fine line leads to each point unless there are more than `most_lines`.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    size = axes.bbox.height / axes.figure.dpi
    step = LINE / size  # as a share of the axes' height
    order = sorted(ends, key=lambda t: ends[t][1])
    wanted = [(ends[t][1] - bottom) / (top - bottom) for t in order]
    heights = spread(wanted, step)
    for title, height in zip(order, heights, strict=True):
        x, y, colour, mark = ends[title]
        inside = axes.transAxes
        start = ((x - left) / (right - left), (y - bottom) / (top - bottom))
        axes.plot(
            [start[0], 1.0, 1.015],
            [start[1], height, height],
            transform=inside,
            color=colour,
            lw=0.6 if len(ends) <= most_lines else 0.0,
            alpha=0.45,
            clip_on=False,
            zorder=1,
        )
        face = PAPER if title == START else colour
        axes.plot(1.025, height, mark, transform=inside, color=colour, mfc=face, mec=colour, ms=4.5, clip_on=False)
        axes.annotate(
            title, (1.025, height), (8, 0), inside, "offset points", color=colour, va="center", fontsize=9.5,
            parse_math=False, annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Rising positions at least `step` apart, near the wanted (rising) ones, within 0..1 where they fit."""
    found: list[float] = []
    for position in wanted:
        found.append(max(position, found[-1] + step) if found else max(0.0, position))
    over = max(0.0, found[-1] - 1.0)
    found[-1] -= over
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - step)
    return found


def bounds(
    lines: Mapping[str, Sequence[tuple[float, Estimate]]], style: Mapping[str, tuple[str, str]], width: float
) -> str:
    """Achieved fall of the mean cost against the requested one. lines: title -> (requested, achieved), rising."""
    height = _height(1.6 + 0.34 * width, len(lines))
    figure, axes = new_axes(width, height, left=0.45, right=_margin(list(lines)), top=0.3, bottom=0.5)
    asked = sorted({b for points in lines.values() for b, _ in points})
    pad = 0.08 * max(asked[-1] - asked[0], 1.0)
    axes.plot([asked[0] - pad, asked[-1] + pad], [asked[0] - pad, asked[-1] + pad], color=INK, lw=1, ls=DASH)
    for i, (title, points) in enumerate(lines.items()):
        colour, mark = style[title]
        shift = (i - (len(lines) - 1) / 2) * 0.02 * (asked[-1] - asked[0] or 1.0)  # intervals side by side
        x, y = [b + shift for b, _ in points], [a.value for _, a in points]
        axes.plot(x, y, mark, ls="-", color=colour, lw=1.5, ms=6.5, mec=PAPER, mew=0.8, zorder=3)
        for at, (_, a) in zip(x, points, strict=True):
            if a.low is not None and a.high is not None:
                axes.plot([at, at], [a.low, a.high], color=colour, lw=1.4, alpha=0.5, solid_capstyle="butt")
    axes.set_xticks(asked, [f"{b:g}" for b in asked])
    axes.set_xlim(asked[0] - pad, asked[-1] + pad)
    axes.set_xlabel("requested →", loc="right")
    axes.set_title("↑ achieved", loc="left", fontsize=10, color=MUTED)
    _name(axes, {t: (p[-1][0], p[-1][1].value, *style[t]) for t, p in lines.items()})
    return to_svg(figure, f"bounds-{width:.0f}", "Requested against achieved fall of the mean cost")


def compensation(
    curves: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    style: Mapping[str, tuple[str, str]],
    name: str,
    label: str,
    width: float,
) -> str:
    """A share of prompts left unsafe (up) against mean cost (right); a method's runs at several bounds are joined."""
    height = _height(1.6 + 0.3 * width, len(curves))
    figure, axes = new_axes(width, height, left=0.5, right=_margin(list(curves)), top=0.3, bottom=0.5)
    ends = {}
    for title, found in curves.items():
        colour, mark = style.get(title, (MUTED, "o"))
        points = sorted(found, key=lambda p: p[0].value)
        axes.plot(
            [c.value for c, _ in points],
            [u.value for _, u in points],
            mark,
            ls="-",
            color=colour,
            lw=1.2,
            ms=6.5,
            mec=colour if title == START else PAPER,
            mfc=PAPER if title == START else colour,
            mew=0.8,
            zorder=3,
        )
        for cost, unsafe in points:
            _cross(axes, cost, unsafe, colour)
        ends[title] = (points[-1][0].value, points[-1][1].value, colour, mark)
    axes.margins(0.06)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("mean cost, by the trained cost model →", loc="right")
    axes.set_title(f"↑ {label}", loc="left", fontsize=10, color=MUTED)
    _name(axes, ends, most_lines=12)  # most points lie close together at the bottom
    return to_svg(figure, f"{name}-{width:.0f}", f"{label} against mean cost")


def lines(
    name: str,
    series: Sequence[Sequence[tuple[float, float]]],
    dashed: float | None = None,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
    marks: bool = False,
) -> str:
    """A small panel: one line a run over its steps. dashed: a level to hold against. bands: (step, low, high)."""
    figure, axes = new_axes(3.1, 1.9, left=0.45, right=0.1, bottom=0.3)
    for band in bands:
        steps, low, high = np.array(band).T
        if len(steps) > 1:
            axes.fill_between(steps, low, high, color=AFTER, alpha=0.12, lw=0)
        else:
            axes.plot([steps[0]] * 2, [low[0], high[0]], color=AFTER, lw=1.1, alpha=0.4)
    for points in series:
        steps, values = np.array(points).T
        axes.plot(steps, values, "o-" if marks else "-", color=AFTER, lw=1.3, alpha=0.8, ms=4)
    if dashed is not None:
        axes.axhline(dashed, color=INK, lw=1, ls=DASH)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.02)
    first, last = axes.get_xlim()
    if last - first < 1:  # one step alone
        axes.set_xlim(first - 0.5, last + 0.5)
    return to_svg(figure, name, name.replace("-", " "))
