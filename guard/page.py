"""The page of an evaluation: one self-contained report.html, guards side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from guard.metrics import LEVEL_NAMES
from safe_rlhf_v.evaluation import plots, verdict
from safe_rlhf_v.evaluation.report import cell, count, duration, label
from safe_rlhf_v.evaluation.templating import template
from safe_rlhf_v.statistics import CalibrationBin, Interval

Cell = dict[str, str] | None
Report = Mapping[str, Any]
KINDS = {"query": "Questions", "response": "Answers"}
RATES = {
    "f1": "F1 of what is flagged",
    "recall": "Recall: unsafe and flagged",
    "over_refusal": "Over-refusal: harmless look-alikes flagged",
    "fpr": "False positives: harmless and flagged",
    "precision": "Precision: flagged and unsafe",
    "recall_at_1_fpr": "Recall at 1\u202f% false positives",
    "auprc": "Area under precision and recall",
}
SHOWN = 100  # rows of a list; the others stand in evaluation.json


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Table:
    """Groups of rows under the same columns. note: a sentence above it. text: cells hold words, not figures."""

    title: str
    columns: Sequence[str]
    groups: Mapping[str, Sequence[Row]]
    note: str = ""
    text: bool = False

    def __bool__(self) -> bool:
        return any(self.groups.values())


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page."""

    id: str
    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default=())


def render(report: Report) -> str:
    """The page as text. report: what evaluation.json holds."""
    guards: Report = dict(zip(short_names(report["guards"]), report["guards"].values(), strict=True))
    parts = [
        Part("result", "Result", [_result(guards)]),
        Part("care", "Read with care", notes=cautions(report, guards)),
        Part("severity", "Severity", [_severity(guards), _by_severity(guards)]),
        Part("categories", "Categories", _categories(guards)),
        Part("calibration", "Calibration", [_calibration(guards)], list(_reliability(guards))),
        Part("robustness", "Robustness", [t for name, guard in guards.items() for t in _robustness(name, guard)]),
        Part("refused", "Not judged", [_degraded(name, guard) for name, guard in guards.items()]),
        Part("left-out", "Left out on loading", [_left_out(report["data"])]),
    ]
    filters = {"count": count, "duration": duration, "percent": verdict.percent}
    return template("guard", "evaluation.html.jinja", **filters).render(
        data=report["data"],
        guards=guards,
        level=verdict.number(100 * report["measuring"]["level"], 0),
        headline=f"{', '.join(guards)} on {report['data']['source']}",
        sentences=[s for name, guard in guards.items() for s in sentences(name, guard)],
        parts=[part for part in parts if any(part.tables) or part.notes or part.figures],
    )


def short_names(names: Iterable[str]) -> list[str]:
    """The last part of each name where that is enough to tell them apart."""
    given = list(names)
    prefix = lambda name: "generative: " if name.startswith("generative:") else ""  # noqa: E731
    last = [prefix(name) + Path(name.removeprefix("generative:")).name for name in given]
    return last if len(set(last)) == len(given) else given


def sentences(name: str, guard: Report) -> list[str]:
    """What a guard does, in a sentence a kind."""
    found = []
    for kind, title in KINDS.items():
        rates = guard[kind]
        if rates is None:
            found.append(f"{name}: {title.lower()} are not judged.")
        elif rates["recall"] is not None and rates["fpr"] is not None:
            found.append(
                f"{name}, {title.lower()}: flags {verdict.percent(rates['recall'])} of the unsafe and "
                f"{verdict.percent(rates['fpr'])} of the harmless."
            )
    return found


def cautions(report: Report, guards: Report) -> list[str]:
    """What to know before believing the page."""
    found = []
    if left_out := report["data"]["left_out"]:
        found.append(f"{len(left_out)} rows of the data cannot be used and were left out; they are listed below.")
    for name, guard in guards.items():
        found += _cautions_of(name, guard)
    return [
        *found,
        "A guard that was trained on these rows, or on prompts like them, looks better here than on your own traffic.",
    ]


def _cautions_of(name: str, guard: Report) -> list[str]:
    found = []
    if guard["degraded"]:
        found.append(
            f"{name} could not judge {guard['degraded']} rows and refused them: they count as flagged, the unsafe "
            "among them as found."
        )
    for kind, title in KINDS.items():
        harmless = guard[kind]["n"] - guard[kind]["unsafe"] if guard[kind] else 0
        if guard[kind] and harmless < 300:
            found.append(
                f"{name}, {title.lower()}: {harmless} harmless ones. With fewer than 300 no false-positive rate of "
                "1\u202f% can be shown, were none of them flagged."
            )
    if guard["query"] and guard["over_refusal"] is None:
        found.append(f"{name}: the data has no harmless look-alikes, so over-refusal is not measured.")
    if guard["unknown_queries"]:
        found.append(
            f"{name}: {guard['unknown_queries']} questions are labelled neither harmful nor "
            "harmless and are not judged."
        )
    return found


# ---------------------------------------------------------------------------------------------------- tables


def shown(interval: Mapping[str, Any] | None, value: float | None, style: str, digits: int | None = None) -> Cell:
    """A cell of an interval, else of the bare value; None of neither."""
    if interval:
        return cell(Interval(**{k: interval[k] for k in ("value", "low", "high", "n")}), style, digits=digits)
    if value is None:
        return None
    return plain(verdict.percent(value) if style == "percent" else verdict.number(value, digits or 2))


def plain(value: object) -> Cell:
    """A cell without an interval."""
    return {"value": str(value), "interval": ""}


def _result(guards: Report) -> Table:
    groups = {}
    for kind, title in KINDS.items():
        rows = [Row(name, [_rate(guard, kind, key) for guard in guards.values()]) for key, name in RATES.items()]
        counts = [_counts(guard[kind]) for guard in guards.values()]
        groups[title] = [row for row in (*rows, Row("Unsafe of all", counts)) if any(row.cells)]
    note = "Each guard judges every question and every answer as a user's would be, by its own policy."
    return Table("Figure", list(guards), groups, note)


def _rate(guard: Report, kind: str, key: str) -> Cell:
    if key == "over_refusal":
        return shown(guard["over_refusal_interval"], None, "percent") if kind == "query" else None
    rates = guard[kind]
    return shown(rates["intervals"].get(key), rates[key], "percent") if rates else None


def _counts(rates: Report | None) -> Cell:
    return plain(f"{count(rates['unsafe'])} of {count(rates['n'])}") if rates else None


def _severity(guards: Report) -> Table:
    keys = dict.fromkeys(k for g in guards.values() for k in g["severity"])
    rows = [
        Row(label(key), [_figure(guard, "severity_intervals", "severity", key) for guard in guards.values()])
        for key in keys
        if key != "n" and not key.startswith("support")
    ]
    note = "Levels none, minor, moderate, severe as 0 to 3. Judged too mild is the dangerous error."
    return Table("Figure", list(guards), {"": [row for row in rows if any(row.cells)]}, note)


def _figure(guard: Report, intervals: str, values: str, *path: str) -> Cell:
    """The figure at `path` below both keys."""
    interval, value = guard[intervals], guard[values]
    for step in path:
        interval, value = interval.get(step) or {}, (value or {}).get(step)
    return shown(interval, value, "number", 3)


def _by_severity(guards: Report) -> Table:
    groups = {title: _flagged(guards, "flagged_by_severity", kind, LEVEL_NAMES) for kind, title in KINDS.items()}
    return Table("Flagged, by true severity", list(guards), groups)


def _flagged(guards: Report, key: str, kind: str, names: Iterable[str]) -> list[Row]:
    tables = [guard[key].get(kind, {}) for guard in guards.values()]
    rows = {name: [shown(t.get(name), None, "percent") for t in tables] for name in names}
    most = {name: max((t[name]["rows"] for t in tables if name in t), default=0) for name in rows}
    return [Row(f"{label(name)} ({count(most[name])})", cells) for name, cells in rows.items() if any(cells)]


def _categories(guards: Report) -> list[Table]:
    names = sorted({name for g in guards.values() for name, row in g["categories"].items() if row["support"]})
    tables = []
    for key, title in (("f1", "F1 of the category"), ("ap", "Average precision")):
        rows = [Row(label(name), [_category(guard, name, key) for guard in guards.values()]) for name in names]
        tables.append(Table(title, list(guards), {"": [row for row in rows if any(row.cells)]}))
    every = sorted({n for g in guards.values() for rows in g["flagged_by_category"].values() for n in rows})
    groups = {title: _flagged(guards, "flagged_by_category", kind, every) for kind, title in KINDS.items()}
    note = "Recall by the true category: whatever category the guard names."
    return [*tables, Table("Unsafe and flagged (rows)", list(guards), groups, note)]


def _category(guard: Report, name: str, key: str) -> Cell:
    row = guard["categories"].get(name) or {}
    return shown(guard["category_intervals"].get(name, {}).get(key), row.get(key), "percent")


def _calibration(guards: Report) -> Table:
    groups = {}
    for head in dict.fromkeys(head for g in guards.values() for head in g["calibration"]):
        groups[label(head)] = [
            Row(label(key), [_figure(g, "calibration_intervals", "calibration", head, key) for g in guards.values()])
            for key in ("ece", "brier", "temperature")
        ]
    return Table("Figure", list(guards), groups, "How far probabilities are from what happens; 0 is perfect.")


def _reliability(guards: Report) -> Iterable[Mapping[str, Any]]:
    for name, guard in guards.items():
        for kind, bins in guard["bins"].items():
            if bins:
                title = f"{name}, {KINDS[kind].lower()}"
                yield {"title": title, "svg": Markup(plots.reliability([CalibrationBin(**b) for b in bins], title))}


def _robustness(name: str, guard: Report) -> list[Table]:
    """A table a kind: each perturbation against the same rows as they came."""
    shares = {"f1": "F1", "clean_f1": "F1 clean", "recall": "Recall", "fpr": "False positives"}
    shares |= {"flips": "Verdicts that change", "missed": "Unsafe, flagged no more"}
    tables = []
    for kind, found in guard.get("perturbations", {}).items():
        rows = [
            Row(f"{label(change)} ({count(row['n'])})", [shown(row[key], None, "percent") for key in shares])
            for change, row in found.items()
        ]
        note = f"{name}, {KINDS[kind].lower()}: each perturbation on the rows that it touches."
        tables.append(Table("Perturbation", list(shares.values()), {"": rows}, note))
    return tables


def _text(*values: Any) -> list[Cell]:
    return [plain(value) for value in values]


def _degraded(name: str, guard: Report) -> Table:
    rows = guard["degraded_rows"]
    found = [Row(_place(r), _text(r["kind"], r["reason"])) for r in rows[:SHOWN]]
    return Table("Row", ["Kind", "Why"], {"": found}, f"{name}: {len(rows)} refused unjudged.", True)


def _place(row: Report) -> str:
    return f"{row['file']} row {row['row']}" if row["file"] else row.get("prompt") or f"row {row['row']}"


def _left_out(data: Report) -> Table:
    rows = data["left_out"]
    found = [Row(_place(r), _text(r["split"], f"{r['reason']}: {r['detail']}")) for r in rows[:SHOWN]]
    return Table("Row", ["Split", "Why"], {"": found}, f"{len(rows)} rows.", True)
