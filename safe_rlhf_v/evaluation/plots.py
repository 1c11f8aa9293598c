"""Figures as inline SVG text: no files, no fonts, no colours of their own.

Colours are written as stand-in codes and replaced by the page's CSS variables, so that figures follow light, dark and
print; text keeps the page's font. Text does not scale well, so wide figures take their width (in inches) and the page
holds one for desktops (WIDE) and one for telephones (NARROW). Before and after differ in shape as well as colour (blue
and vermilion, safe for the colour-blind).
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy import stats

from safe_rlhf_v.evaluation.report_data import GuardRound
from safe_rlhf_v.statistics import CalibrationBin, Interval

INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
BEFORE, AFTER, SHADE = "#010207", "#010208", "#010209"
SEVERITY = ("#010210", "#010211", "#010212", "#010213")
METHODS = tuple(f"#01022{i}" for i in range(8))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", BEFORE: "--before", AFTER: "--after",
    SHADE: "--shade", **{code: f"--severity-{level}" for level, code in enumerate(SEVERITY)},
    **{code: f"--method-{i}" for i, code in enumerate(METHODS)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDE, NARROW = 9.4, 5.0
PERCENT = FuncFormatter(lambda x, _: f"{100 * x:.0f} %")


def new_axes(
    width: float, height: float, *, left: float = 0.5, right: float = 0.1, top: float = 0.1, bottom: float = 0.35
) -> tuple[Figure, Axes]:
    """An empty figure; all in inches (72 units of the SVG), margins included."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    axes.tick_params(length=0)
    return figure, axes


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one <svg> element. name: prefix that keeps ids unique on the page. label: for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font(?:-family)?: [^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for code, variable in _VARIABLES.items():
        text = text.replace(code, f"var({variable})")
    box = re.search(r'viewBox="([^"]+)"', text)
    head = f'<svg class="plot" role="img" aria-label="{label}" viewBox="{box.group(1) if box else ""}"'
    return re.sub(r"<svg[^>]*", head, text, count=1).strip()


def categories(base: Mapping[str, Interval], aligned: Mapping[str, Interval], width: float = WIDE) -> str:
    """Unsafe rate of each group before and after, with intervals, worst after first."""
    names = sorted(base.keys() & aligned.keys(), key=lambda k: (aligned[k].value, base[k].value, k))
    left = 0.25 + 0.078 * max(len(name) for name in names)
    figure, axes = new_axes(width, 0.5 + 0.36 * len(names), left=left, right=0.3)
    for row, name in enumerate(names):
        axes.plot([base[name].value, aligned[name].value], [row + 0.13, row - 0.13], color=RULE, lw=1)
        _interval_mark(axes, base[name], row + 0.13, BEFORE, "o")
        _interval_mark(axes, aligned[name], row - 0.13, AFTER, "D")
    axes.set_yticks(range(len(names)), [n.replace("_", " ").capitalize() for n in names], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.6, len(names) - 0.4))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return to_svg(
        figure, f"categories-{width:.0f}", "Unsafe rate by category, before and after, with 95 percent intervals"
    )


def _interval_mark(axes: Axes, interval: Interval, height: float, colour: str, marker: str) -> None:
    if interval.low is not None and interval.high is not None:
        axes.plot(
            [interval.low, interval.high], [height, height], color=colour, lw=1.6, alpha=0.55, solid_capstyle="butt"
        )
    axes.plot(interval.value, height, marker, color=colour, ms=5.5, mec=PAPER, mew=0.8)


def severities(base: Sequence[Interval], aligned: Sequence[Interval], width: float = WIDE) -> str:
    """Shares of answers of severity 0..3, before above after, as two stacked bars."""
    figure, axes = new_axes(width, 1.25, left=0.65, right=0.25, top=0.02, bottom=0.3)
    for height, side in ((1, base), (0, aligned)):
        start = 0.0
        for level, share in enumerate(side):
            axes.barh(height, share.value, 0.66, left=start, color=SEVERITY[level], ec=PAPER, lw=1.2)
            if share.value * width >= 0.45:
                shade = INK if level < 2 else PAPER
                axes.text(
                    start + share.value / 2, height, f"{100 * share.value:.0f} %", ha="center", va="center", color=shade
                )
            start += share.value
    axes.set_yticks([1, 0], ["before", "after"])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(xlim=(0, 1), ylim=(-0.5, 1.5))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    return to_svg(figure, f"severities-{width:.0f}", "Shares of answers by severity, before and after")


def plane(
    base: Sequence[tuple[float, float, float]],
    aligned: Sequence[tuple[float, float, float]],
    threshold: float,
    width: float = WIDE,
) -> str:
    """Trained reward against trained cost of each prompt; filled where the judge calls at least half of it unsafe."""
    figure, axes = new_axes(width, 2.2 + 0.3 * width, left=0.45, right=0.05, top=0.3, bottom=0.5)
    rows = np.array([*base, *aligned])
    low, high = rows[:, :2].min(0), rows[:, :2].max(0)
    pad = 0.06 * np.maximum(high - low, 1e-3)
    bottom, top = min(low[1], threshold, 0) - pad[1], max(high[1], threshold, 0) + pad[1]
    axes.axhspan(0, top, color=SHADE, lw=0)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axhline(threshold, color=INK, lw=1, ls=(0, (5, 3)))
    for points, colour, marker in ((np.array(base), BEFORE, "o"), (np.array(aligned), AFTER, "D")):
        unsafe = points[:, 2] >= 0.5
        size = 20 if marker == "o" else 16
        axes.scatter(
            points[~unsafe, 0],
            points[~unsafe, 1],
            s=size,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            lw=0.8,
            alpha=0.6,
        )
        axes.scatter(points[unsafe, 0], points[unsafe, 1], s=size, marker=marker, color=colour, lw=0, alpha=0.7)
        _mean_with_ellipse(axes, points[:, :2], colour, marker)
    axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(bottom, top))
    axes.text(high[0] + pad[0], top, "unsafe to the cost model ", ha="right", va="top", color=MUTED)
    axes.set_xlabel("reward →", loc="right")
    axes.set_title("↑ cost", loc="left", fontsize=10, color=MUTED)
    return to_svg(figure, f"plane-{width:.0f}", "Trained reward against trained cost of each prompt, before and after")


def _mean_with_ellipse(axes: Axes, points: np.ndarray, colour: str, marker: str) -> None:
    """The mean and the 95 % region of the mean (normal theory)."""
    mean = points.mean(0)
    if len(points) > 2:
        values, vectors = np.linalg.eigh(np.cov(points.T) / len(points))
        width, height = 2 * np.sqrt(np.maximum(values, 0) * stats.chi2.ppf(0.95, 2))
        angle = float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))
        axes.add_patch(
            Ellipse((mean[0], mean[1]), width, height, angle=angle, fc=colour, ec=colour, alpha=0.35, zorder=3)
        )
    axes.plot(*mean, marker, color=colour, ms=9, mec=PAPER, mew=1.6, zorder=4)


def smoothing(steps: int) -> int:
    """Half width of the running mean over so many steps; 1 or less means none."""
    return steps // 40


def trajectory(rows: Sequence[Mapping[str, float]], key: str, threshold: float | None = None) -> str:
    """One quantity over training steps: every step faint, the running mean strong; with the threshold if given."""
    points = np.array([(row["step"], row[key]) for row in rows if key in row])
    figure, axes = new_axes(4.6, 2.3, left=0.5, right=0.12, bottom=0.3)
    steps, values = points.T
    half = smoothing(len(values))
    if half > 1:
        axes.plot(steps, values, color=AFTER, lw=0.8, alpha=0.35)
        values = np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
    axes.plot(steps, values, color=AFTER, lw=1.8)
    if threshold is not None:
        axes.axhline(threshold, color=INK, lw=1, ls=(0, (5, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01)
    return to_svg(figure, f"trajectory-{key}", f"{key} over training steps")


def guard_rounds(rounds: Sequence[GuardRound], width: float = WIDE) -> str:
    """Unsafe answers of those given, refusals and needless refusals by round, each last value written at its mark."""
    figure, axes = new_axes(width, 2.9, left=0.6, right=1.75, bottom=0.55)
    every = (
        ("unsafe, of given", [r.unsafe_rate for r in rounds], AFTER, "D"),
        ("refused", [r.gave_up_rate for r in rounds], MUTED, "o"),
        ("refused, harmless", [r.harmless_refused_rate for r in rounds], BEFORE, "s"),
    )
    lines = [(name, [(k, v) for k, v in enumerate(y) if v is not None], c, m) for name, y, c, m in every]
    lines = [line for line in lines if line[1]]
    top = max(0.05, *(v for _, points, _, _ in lines for _, v in points))
    heights = spread([points[-1][1] for _, points, _, _ in lines], 0.09 * top)
    for (name, points, colour, marker), height in zip(lines, heights, strict=True):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, f"{marker}-", color=colour, lw=1.8, ms=6, mec=PAPER, mew=1, clip_on=False)
        axes.text(len(rounds) - 1 + 1.1 / width, height, f"{name} {100 * y[-1]:.1f} %", color=colour, va="center")
    if lines[0][0] == every[0][0]:
        axes.text(0.08, lines[0][1][0][1], f" {100 * lines[0][1][0][1]:.1f} %", color=AFTER, va="bottom")
    axes.set(ylim=(0, 1.12 * top), xlim=(-0.1, len(rounds) - 0.95))
    axes.set_xticks(range(len(rounds)), ["no guard", *(str(r.round) for r in rounds[1:])])
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", pad=9)
    axes.set_xlabel("rounds allowed →", loc="right")
    what = "Unsafe answers of those given, refusals and needless refusals by number of guard rounds"
    return to_svg(figure, f"guard-rounds-{width:.0f}", what)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, in their order, moved up where needed so that any two lie at least `gap` apart."""
    moved = list(heights)
    for before, i in itertools.pairwise(sorted(range(len(moved)), key=moved.__getitem__)):
        moved[i] = max(moved[i], moved[before] + gap)
    return moved


def reliability(bins: Sequence[CalibrationBin], name: str) -> str:
    """Observed frequency against predicted probability; marks grow with the count; the dashed line is perfect."""
    figure, axes = new_axes(3.1, 2.9, left=0.5, bottom=0.45)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (5, 3)))
    most = max(b.count for b in bins)
    axes.plot([b.confidence for b in bins], [b.frequency for b in bins], color=AFTER, lw=1, alpha=0.5)
    sizes = [12 + 90 * b.count / most for b in bins]
    axes.scatter(
        [b.confidence for b in bins], [b.frequency for b in bins], s=sizes, color=AFTER, ec=PAPER, lw=0.8, zorder=3
    )
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
        axis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("predicted →", loc="right")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return to_svg(figure, f"reliability-{slug}", f"Reliability diagram: {name}")
