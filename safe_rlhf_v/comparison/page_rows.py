"""The rows of the page's tables: methods, claims, bounds, compensation, effort."""

from __future__ import annotations

from typing import Any

import numpy as np

from safe_rlhf_v.comparison.claims import Finding
from safe_rlhf_v.comparison.comparison import FIGURES, Comparison, compensations
from safe_rlhf_v.comparison.crossed import Estimate, crossed
from safe_rlhf_v.comparison.plots import START
from safe_rlhf_v.comparison.runs import REFERENCE
from safe_rlhf_v.evaluation.report import cell
from safe_rlhf_v.evaluation.verdict import number, percent
from safe_rlhf_v.statistics import Interval

TABLE = ("unsafe_rate", "prompts_left_unsafe", "helpfulness", "over_refusal_rate", "mean_cost")
EFFORT = ("seconds", "sampled", "pairs", "steps")


def p_value(p: float | None) -> str:
    """0.0312 -> '0.031', 0.00002 -> '< 0.001'."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_interval(e: Estimate) -> Interval:
    """For `report.cell`."""
    return Interval(value=e.value, low=e.low, high=e.high, n=e.prompts)


def _cell(e: Estimate | None, style: str, *, change: bool = False) -> dict[str, str] | None:
    return cell(as_interval(e), style, change=change) if e else None


def method_row(comparison: Comparison, method: str, title: str) -> dict[str, Any]:
    """A method's line: its figures, and the paired difference to the start model of the first two that matter."""
    cells = [_cell(comparison.estimate(method, f), FIGURES[f].style) for f in TABLE]
    return {"title": title, "cells": cells, "seeds": len(comparison.of(method))}


def claim_row(finding: Finding) -> dict[str, Any]:
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
    show = percent if style == "percent" else number
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


def bound_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Requested and achieved, a line a method and bound."""
    rows = []
    for method, points in bound_lines(comparison).items():
        for bound, achieved in points:
            table = np.stack(list(comparison.improvement(method, bound).values()))
            unsafe = comparison.estimate(method, "unsafe_rate", requested=bound)
            error = _cell(crossed(table - bound), "number", change=True)
            row = {"title": comparison.methods[method], "bound": bound, "error": error, "seeds": achieved.seeds}
            rows.append(row | {"achieved": _cell(achieved, "number"), "unsafe": _cell(unsafe, "percent")})
    return rows


def bound_lines(comparison: Comparison) -> dict[str, list[tuple[float, Estimate]]]:
    """Method -> (requested, achieved), of methods with a model at two bounds or more, whichever these are."""
    lines = {}
    for method in comparison.methods:
        tables = {b: t for b in comparison.bounds(method) if (t := comparison.improvement(method, b))}
        if len(tables) > 1:
            lines[method] = [(b, crossed(np.stack(list(t.values())))) for b, t in tables.items()]
    return lines


def compensation_rows(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    for method, title in {REFERENCE: START, **methods}.items():
        found = compensations(comparison.of(method))
        if found:
            left = _cell(comparison.estimate(method, "prompts_left_costly"), "percent")
            rows.append({"title": title, **found, "left": left})
    return rows


def effort_rows(comparison: Comparison, methods: dict[str, str]) -> list[dict[str, Any]]:
    """Mean seconds, responses drawn, pairs read and steps of a method's runs at the main bound."""
    rows: list[dict[str, Any]] = []
    for method, title in methods.items():
        infos = [r.info for r in comparison.of(method)]
        means = {name: float(np.mean([getattr(i, name) for i in infos])) for name in EFFORT}
        rows.append({"title": title, "stage": infos[0].stage, "runs": len(infos), **means})
    longest = max((float(row["seconds"]) for row in rows), default=0.0)
    return [row | {"share": float(row["seconds"]) / longest if longest else 0.0} for row in rows]
