"""What the doctor found, as tables and as plain values."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from safe_rlhf_v.console import console
from safe_rlhf_v.planning.doctor import GIB, Report


def print_report(report: Report) -> None:
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table(title="checks", title_justify="left", title_style="bold", show_header=False)
    for check in report.checks:
        colour = colours[check.outcome]
        table.add_row(check.name, f"[{colour}]{check.outcome}[/]", escape(check.detail))
    console.print(table)
    table = Table(title="predicted peak memory of a device, GiB", title_justify="left", title_style="bold")
    for column in ("stage", "what", "GiB", ""):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for stage in report.stages:
        for name, size in stage.held.items():
            table.add_row(stage.stage, name, f"{size / GIB:.2f}", "all the time")
        for name, size in stage.passing.items():
            table.add_row(stage.stage, name, f"{size / GIB:.2f}", "one of these at a time")
        verdict = {True: "[green]fits[/]", False: "[bold red]does not fit[/]", None: ""}[report.fits(stage)]
        table.add_row(f"[bold]{stage.stage}[/]", "[bold]peak[/]", f"[bold]{stage.peak / GIB:.2f}[/]", verdict)
        table.add_section()
    console.print(table)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values; sizes in bytes."""
    stages = [
        {"stage": s.stage, "held": dict(s.held), "passing": dict(s.passing), "peak": s.peak, "fits": report.fits(s)}
        for s in report.stages
    ]
    checks = [{"name": c.name, "outcome": c.outcome, "detail": c.detail} for c in report.checks]
    plan = {"devices": report.machine.devices, "memory": report.machine.memory, "sharded": report.machine.sharded}
    return {"passed": report.passed, "machine": plan, "checks": checks, "stages": stages}
