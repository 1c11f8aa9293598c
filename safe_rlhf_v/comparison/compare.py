"""The comparison: base stages, then every run in parallel processes, then one page and two tables."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from safe_rlhf_v.comparison.base import Base, base_of
from safe_rlhf_v.comparison.claims import judge_claims
from safe_rlhf_v.comparison.comparison import Comparison
from safe_rlhf_v.comparison.measure import stage_metrics
from safe_rlhf_v.comparison.page import Failure, PageData, write_page
from safe_rlhf_v.comparison.plan import plan_runs
from safe_rlhf_v.comparison.planned import PlannedRun, measured, run_job, write_run
from safe_rlhf_v.comparison.results import write_results
from safe_rlhf_v.comparison.runs import read_run
from safe_rlhf_v.comparison.settings import CompareSettings
from safe_rlhf_v.config_io import SettingsError, dump_yaml
from safe_rlhf_v.console import console, plain
from safe_rlhf_v.demo.quickstart import make_start, make_world
from safe_rlhf_v.jobs.live import LiveWatcher, clock
from safe_rlhf_v.jobs.scheduler import THREADS, Job, Outcome, run_jobs
from safe_rlhf_v.stages.folder import write_json


def compare(settings: CompareSettings) -> bool:
    """Runs what is not done, writes compare.html, compare.json, results.parquet and results_by_prompt.parquet; returns
    whether every run ended well. Raises SettingsError where the base cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        draft = base_of(settings, Path(folder, "run.yaml"))
        plan_runs(settings, draft, 0.0)  # mistakes in any method's settings come before all work
        reference = draft.reference()
    write_run(reference)  # refuses a base of other settings
    base, workers = base_of(settings), settings.workers or os.cpu_count() or 1  # more threads a process are slower
    _make_world(settings, base)
    _base([*base.jobs, _after_base(reference, base)], workers)
    runs = plan_runs(settings, base, _mean_cost(reference.folder))
    for run in runs:
        write_run(run)
    failures = _failures(_all(runs, workers))
    page = write_comparison(settings, reference, runs, failures)
    plain(f"page: {page}\nresults: {page.with_name('results.parquet')}")
    return not failures


def _make_world(settings: CompareSettings, base: Base) -> None:
    """The picture world and its start model, where the settings name no data or model."""
    if base.settings.data.path == str(base.folder / "data"):
        world = {"train": settings.world.train, "evaluation": settings.world.evaluation}
        make_world(base.settings, **world, pictures=None, held_out_style=None)
    if base.settings.model.path == str(base.folder / "start"):
        make_start(base.settings)


def _after_base(reference: PlannedRun, base: Base) -> Job:
    """The reference is measured once the base's models are there."""
    return replace(run_job(reference), name="start model, measured", after=[one.name for one in base.jobs])


def _base(jobs: Sequence[Job], workers: int) -> None:
    console.rule("[bold]base: what all methods share", align="left")
    with LiveWatcher(console, len(jobs)) as watcher:
        outcomes = run_jobs(jobs, workers, watcher, THREADS)
    bad = [name for name, outcome in outcomes.items() if not outcome.good]
    if bad:
        log = next(job.log for job in jobs if job.name == bad[0])
        raise SettingsError(f"{bad[0]} failed, and nothing can be compared without it; see {log}")


def _mean_cost(folder: Path) -> float:
    """The start model's mean cost when it was first measured. Bounds are counted from it, and it is written down: were
    it taken anew with every change of `evaluation`, all bounds would move and every run would have to be trained again.
    """
    file = folder / "mean_cost.json"
    if not file.is_file():
        costs = pq.read_table(folder / "answers.parquet")["cost"].to_pylist()
        write_json(file, {"mean_cost": sum(costs) / len(costs)})
    return float(json.loads(file.read_text(encoding="utf-8"))["mean_cost"])


def _all(runs: Sequence[PlannedRun], workers: int) -> dict[str, Outcome]:
    jobs = [run_job(run) for run in runs]
    known: dict[str, list[float]] = {}
    for run, job in zip(runs, jobs, strict=True):
        if job.done() and (seconds := _measured(run.folder)["seconds"]):
            known.setdefault(job.kind, []).append(seconds)
    console.rule(Text(f"{len(runs)} runs, {workers} at a time", "bold"), align="left")
    with LiveWatcher(console, len(jobs), known) as watcher:
        return run_jobs(jobs, workers, watcher, THREADS)


def _measured(folder: Path) -> dict[str, Any]:
    return {"seconds": 0.0, "found": True, **json.loads((folder / "measured.json").read_text(encoding="utf-8"))}


def _failures(outcomes: Mapping[str, Outcome]) -> list[Failure]:
    """Every run that is missing from the page: those that failed and those that needed one of them."""
    return [
        Failure(name=name, why=outcome.tail[0] if outcome.tail else "", log="\n".join(outcome.tail[1:]))
        for name, outcome in outcomes.items()
        if not outcome.good
    ]


def write_comparison(
    settings: CompareSettings, reference: PlannedRun, runs: Sequence[PlannedRun], failures: Sequence[Failure]
) -> Path:
    """Page and tables of the runs that are measured; returns the page's path."""
    comparison = Comparison(
        reference=read_run(reference.folder),
        runs=[read_run(run.folder, stage_metrics(run.folder, run.stage)) for run in runs if measured(run.folder)],
    )
    data = PageData(
        comparison=comparison,
        findings=judge_claims(settings.claims, comparison),
        failures=list(failures),
        bound=settings.bound,
        budget=settings.budget,
        samples=reference.settings.evaluation.samples,
        control=settings.control,
        imitate_alone=tuple(name for name, method in settings.methods.items() if method.imitates_alone),
        settings=dump_yaml(settings.model_dump(mode="json", exclude={"quick"})),
    )
    output = Path(settings.output_dir)
    write_results(comparison, output)
    return write_page(data, output)


def show_plan(settings: CompareSettings) -> None:
    """The runs that a comparison would make, and what is there already; changes nothing."""
    reference = Path(settings.output_dir, "base", "reference")
    known = _mean_cost(reference) if measured(reference) else None
    with tempfile.TemporaryDirectory() as folder:
        runs = plan_runs(settings, base_of(settings, Path(folder, "run.yaml")), known or 0.0)
    table = Table("run", "stage", "bound", "state")
    for run in runs:
        bound = "–" if run.bound is None or (known is None and not run.swept) else f"{run.bound:g}"
        table.add_row(Text(run.name), run.stage, bound, _took(run.folder) if measured(run.folder) else "to do")
    console.print(table)
    plain(f"{len(runs)} runs, {sum(measured(run.folder) for run in runs)} of them done")


def _took(folder: Path) -> str:
    info = _measured(folder)
    return f"done in {clock(info['seconds'])}" if info["found"] else "no solution"
