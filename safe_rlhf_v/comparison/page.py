"""The page of a comparison: one self-contained compare.html, and compare.json with the findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safe_rlhf_v.comparison.claims import ALPHA, Finding
from safe_rlhf_v.comparison.comparison import FIGURES, TAU, Comparison
from safe_rlhf_v.comparison.crossed import Estimate, crossed
from safe_rlhf_v.comparison.page_figures import figures, gap_panels, multiplier_panels
from safe_rlhf_v.comparison.page_rows import (
    TABLE,
    bound_rows,
    claim_row,
    compensation_rows,
    effort_rows,
    method_row,
    p_value,
)
from safe_rlhf_v.comparison.plots import START
from safe_rlhf_v.comparison.runs import REFERENCE
from safe_rlhf_v.evaluation import verdict
from safe_rlhf_v.evaluation.report import count, duration
from safe_rlhf_v.evaluation.templating import template
from safe_rlhf_v.files import replace_text


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
    estimates = {n: {f: asdict(e) for f in FIGURES if (e := found.estimate(n, f))} for n in names}
    findings = [asdict(f) | {"claim": f.claim.model_dump()} for f in data.findings]
    return {"findings": findings, "methods": estimates, "failures": [asdict(f) for f in data.failures]}


def render(data: PageData) -> str:
    """The page as text."""
    filters: dict[str, Callable[..., str]] = {"number": verdict.number, "percent": verdict.percent, "p": p_value}
    filters |= {"duration": duration, "count": count}
    comparison = data.comparison
    methods = {m: t for m, t in comparison.methods.items() if comparison.of(m)}
    return template("safe_rlhf_v.comparison", "compare.html.jinja", **filters).render(
        data=data,
        reference=comparison.reference.info,
        prompts=len(comparison.reference.prompts),
        seeds=sorted({r.info.seed for r in comparison.runs}),
        methods=methods,
        headline=headline(data, methods),
        sentences=sentences(data, methods),
        columns=[FIGURES[f].label for f in TABLE],
        rows=[method_row(comparison, m, t) for m, t in {REFERENCE: START, **methods}.items()],
        claims=[claim_row(f) for f in data.findings],
        figures=figures(comparison, methods),
        bounds=bound_rows(comparison),
        compensation=compensation_rows(comparison, methods),
        multipliers=multiplier_panels(comparison, methods),
        gaps=gap_panels(comparison, methods),
        effort=effort_rows(comparison, methods),
        infeasible=[r.info for r in comparison.runs if not r.info.found],
        alpha=ALPHA,
        tau=TAU,
    )


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
