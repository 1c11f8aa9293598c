"""Figures of feedback refinement as inline SVG, in the style of evaluation.plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from safe_rlhf_v.evaluation.plots import AFTER, BEFORE, INK, MUTED, PAPER, PERCENT, new_axes, to_svg
from safe_rlhf_v.statistics import Interval

Styles = Sequence[tuple[str, str, str]]
"""(colour, mark, dash) of each line, in order; they come round again."""
STYLES: Styles = (
    (BEFORE, "o", "-"), (BEFORE, "s", ":"), (MUTED, "o", "-"), (MUTED, "s", ":"), (AFTER, "D", "-"),
    (AFTER, "^", ":"), (INK, "v", ":"),
)  # fmt: skip
GUARD_STYLES: Styles = (STYLES[0], STYLES[1], STYLES[4])


def by_turn(lines: Mapping[str, Sequence[Interval]], name: str, percent: bool, styles: Styles = STYLES) -> str:
    """A value after each turn, one line a way of answering again, with intervals; names stand at the lines' ends."""
    figure, axes = new_axes(9.4, 3.4, left=0.55, right=3.0, bottom=0.5)
    shift = 0.5 * (len(lines) - 1)
    for k, values in enumerate(lines.values()):
        colour, marker, dash = styles[k % len(styles)]
        x = [t + 0.03 * (k - shift) for t in range(1, len(values) + 1)]
        axes.plot(x, [v.value for v in values], marker, ls=dash, color=colour, lw=1.6, ms=5, mec=PAPER, mew=0.8)
        for at, value in zip(x, values, strict=True):
            if value.low is not None and value.high is not None:
                axes.plot([at, at], [value.low, value.high], color=colour, lw=1.1, alpha=0.5)
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    ends = {label: values[-1].value for label, values in lines.items()}
    turns = max(len(values) for values in lines.values())
    for label, height in spread(ends, 0.075 * (high - low)).items():
        k = list(lines).index(label)
        colour, marker, _ = styles[k % len(styles)]
        axes.plot(turns + 0.22, height, marker, color=colour, ms=5, clip_on=False)
        axes.text(turns + 0.3, height, label, color=colour, va="center", clip_on=False)
    axes.set(xlim=(0.85, turns + 0.12), ylim=(low, high))
    axes.set_xticks(range(1, turns + 1))
    if percent:
        axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("answers allowed →", loc="right")
    return to_svg(figure, f"turns-{name}", f"{name} after each turn, with intervals")


def spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, moved apart to at least `gap`, in the order of what they name."""
    placed: dict[str, float] = {}
    floor = -float("inf")
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        floor = placed[label] = max(height, floor)
        floor += gap
    drift = sum(placed[k] - heights[k] for k in heights) / len(heights)
    return {label: height - drift for label, height in placed.items()}


def curve(points: Sequence[Mapping[str, float | None]], key: str, label: str) -> str:
    """One figure against the number of training dialogues, each value written at its mark."""
    known = [(p["training_dialogues"], y) for p in points if (y := p.get(key)) is not None]
    figure, axes = new_axes(3.1, 2.3, left=0.5, bottom=0.5, top=0.25)
    x = list(range(len(known)))
    axes.plot(x, [y for _, y in known], "D-", color=AFTER, lw=1.6, ms=5, mec=PAPER, mew=0.8)
    for at, (_, y) in zip(x, known, strict=True):
        axes.annotate(f"{y:.2f}", (at, y), (0, 6), textcoords="offset points", ha="center", fontsize=9, color=INK)
    axes.margins(x=0.12, y=0.25)
    axes.set_xticks(x, [f"{n:,}" for n, _ in known])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("training dialogues →", loc="right")
    return to_svg(figure, f"curve-{key}", f"{label} by number of training dialogues")
