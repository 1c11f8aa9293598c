"""One self-contained page and one refinement.json: nothing is loaded, style and figures are inside."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from safe_rlhf_v.evaluation.templating import template
from safe_rlhf_v.evaluation.verdict import number, percent
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.refinement.comparison import Comparison
from safe_rlhf_v.refinement.plots import GUARD_STYLES, STYLES, by_turn, curve
from safe_rlhf_v.statistics import Interval

KINDS = {
    "unsafe": ("Unsafe answers, on prompts that invite harm", True, "lower"),
    "helpful": ("Helpfulness (0 to 3), on harmless prompts", False, "higher"),
    "accuracy": ("Right (score {correct} or more), all prompts", True, "higher"),
}
CURVES = {
    "average_turns": "AT, lower is better",
    "adr": "ADR",
    "atr": "ATR",
    "rr": "RR",
    "regression_rate": "regression rate, lower is better",
    "accuracy": "right after the last turn",
}
TEACHER_CURVES = {"mae": "teacher's score error (MAE), lower is better", "pearson": "correlation of its scores"}


def write_page(found: Comparison, folder: str | Path) -> Path:
    """Writes refinement.json and refinement.html; returns the path of the page."""
    target = Path(folder)
    replace_text(target / "refinement.json", json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
    replace_text(target / "refinement.html", render(found))
    return target / "refinement.html"


def render(found: Comparison) -> str:
    """The page as text."""
    correct = found.facts["settings"]["refinement"]["correct"]
    kinds = {
        kind: (label.format(correct=correct), share, better)
        for kind, (label, share, better) in KINDS.items()
        if all(kind in arm.by_turn for arm in found.arms)
    }
    page = template("safe_rlhf_v.refinement", "refinement.html.jinja", number=number, percent=percent)
    return page.render(
        found=found,
        kinds=kinds,
        cell=cell,
        ends=ends,
        figures={kind: _figures(found, kind) for kind in kinds},
        curves=[(label, Markup(curve(found.curve, key, label))) for key, label in CURVES.items()],
        teacher_curves=[(label, Markup(curve(_teachers(found), key, label))) for key, label in TEACHER_CURVES.items()],
        pictures=[_picture(d.prompt) for d in found.examples],
        settings=yaml.safe_dump(found.facts.get("settings", {}), sort_keys=False),
    )


def _figures(found: Comparison, kind: str) -> list[tuple[str, Markup]]:
    """(who says what is unsafe, figure): one with the arms of the truth, one with those of the guard."""
    guards = [arm for arm in found.arms if arm.name.endswith("by guard")]
    groups = {"truth": ([arm for arm in found.arms if arm not in guards], STYLES), "guard": (guards, GUARD_STYLES)}
    return [
        (who, Markup(by_turn({arm.label: arm.by_turn[kind] for arm in arms}, f"{kind}-{who}", KINDS[kind][1], styles)))
        for who, (arms, styles) in groups.items()
        if arms
    ]


def _teachers(found: Comparison) -> list[dict[str, Any]]:
    return [
        {"training_dialogues": p["training_dialogues"], **p["teacher"]["score"]} for p in found.curve if p["teacher"]
    ]


def cell(interval: Interval | dict[str, Any], share: bool, signed: bool = False) -> str:
    """ "12.3 % (10.1 to 14.8)"; a signed one is a difference: "+2.1 pp (-0.3 to +4.6)"."""
    row = interval if isinstance(interval, dict) else {k: getattr(interval, k) for k in ("value", "low", "high")}

    def text(value: float) -> str:
        body = number(100 * value, 1) if share else number(value)
        return f"+{body}" if signed and float(value) > 0 else body

    ends = "" if row["low"] is None else f" ({text(row['low'])} to {text(row['high'])})"
    unit = (" pp" if signed else " %") if share else ""
    return f"{text(row['value'])}{unit}{ends}"


def ends(interval: Interval, share: bool) -> str:
    """ "10.1 to 14.8 %"; nothing where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    low, high = (number(100 * x, 1) if share else number(x) for x in (interval.low, interval.high))
    return f"{low} to {high}{' %' if share else ''}"


def _picture(prompt: Any) -> str:
    if not prompt.images:
        return ""
    return "data:image/png;base64," + base64.b64encode(prompt.images[0].clean().encoded()).decode()
