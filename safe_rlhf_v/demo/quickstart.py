"""The demo: one world, one small model, every stage, one report."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.console import console, plain
from safe_rlhf_v.errors import user_errors
from safe_rlhf_v.evaluation.bars import check, print_outcomes
from safe_rlhf_v.jobs.forked import one_thread, ranks
from safe_rlhf_v.jobs.live import LiveWatcher
from safe_rlhf_v.jobs.progress import share_of_steps
from safe_rlhf_v.jobs.scheduler import THREADS, Job, run_jobs
from safe_rlhf_v.stages import stages
from safe_rlhf_v.stages.folder import read_done, run_stage

TITLES = {
    "data": "draw the picture world, in the layout of BeaverTails-V",
    "start": "the start model: small, it sees and names things and knows nothing else",
    "sft": "fine-tune it on the answers people give, safe or not: the base model",
    "reward": "reward model: which answer is more helpful",
    "cost": "cost model: which answer is safer, and where unsafe begins",
    "guard": "guard: judge questions and answers, severity and category",
    "policy": "align: raise reward while expected cost stays under the bound",
    "report": "measure base and aligned on held-out prompts, judged by the world's oracle",
}
RANKS = 2
"""Processes of each of the stages that the others wait for. Always two, so that more cores change no figure."""
SPLIT = {
    "sft": ("per_device_train_batch_size",),
    "policy": ("per_device_train_batch_size", "mini_batch_size"),
}
"""The stages of several ranks, with the sizes that the ranks share."""
PLACE = re.compile(r"step (\d+) of (\d+)")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the demo. after: the parts whose results it reads."""

    work: Callable[[], object]
    done: Callable[[], bool]
    after: tuple[str, ...] = ()
    cores: int = 1


def quickstart_settings(config: Path | None, overrides: list[str]) -> Settings:
    """The demo's own settings, or a file's, with overrides; model and data are made below output_dir unless given."""
    packaged = resources.files("safe_rlhf_v.demo").joinpath("quickstart.yaml")
    with resources.as_file(packaged) as path:
        settings = load_settings(config or path, overrides)
    output = Path(settings.output_dir)
    settings.model.path = settings.model.path or str(output / "start")
    settings.data.path = settings.data.path or str(output / "data")
    return settings


def make_world(settings: Settings, workers: int = 1, **world: Any) -> None:
    """Draw the picture world to <output_dir>/data, unless it is there. world: arguments of picture_world.write."""
    from beavertails_v.picture_world import write

    def work(folder: Path) -> dict[str, Any]:
        write(folder, seed=settings.seed, workers=workers, **world)
        return {}

    run_stage("data", settings, [], work, **world)


def make_start(settings: Settings, start: Path | None = None) -> None:
    """The picture world's start model to <output_dir>/start, unless it is there."""
    from safe_rlhf_v.demo.tiny import write_picture_world_model

    def work(folder: Path) -> dict[str, Any]:
        write_picture_world_model(folder, start=start)
        return {}

    run_stage("start", settings, [], work, given=start)


def shared_by_ranks(settings: Settings, stage: str, count: int) -> Settings:
    """The settings of each of `count` ranks, which together make the batches that the settings name."""
    section = getattr(settings, stage)
    sizes = {name: getattr(section, name) for name in SPLIT[stage]}
    if odd := [name for name, size in sizes.items() if size % count]:
        raise SettingsError(f"{stage}.{odd[0]} = {sizes[odd[0]]}: {count} processes share it; take a multiple of it")
    smaller = section.model_copy(update={name: size // count for name, size in sizes.items()})
    return settings.model_copy(update={stage: smaller})


def steps_of(settings: Settings, world: dict[str, Any], start: Path | None, count: int) -> dict[str, Step]:
    """Every part of the demo that is made here, in an order in which each stands after those it reads."""
    output = Path(settings.output_dir)
    steps: dict[str, Step] = {}

    def add(name: str, work: Callable[[], object], *after: str, cores: int = 1) -> None:
        done = functools.partial(_is_done, output / name)
        steps[name] = Step(work=work, done=done, after=tuple(a for a in after if a in steps), cores=cores)

    if settings.data.path == str(output / "data"):
        add("data", functools.partial(make_world, settings, workers=count, **world), cores=count)
    if settings.model.path == str(output / "start"):
        add("start", functools.partial(make_start, settings, start))
    add("sft", _shared_stage("sft", settings, count), "data", "start", cores=count)
    for name in ("reward", "cost", "guard"):
        add(name, functools.partial(getattr(stages, name), settings), "sft")
    add("policy", _shared_stage("policy", settings, count), "reward", "cost", cores=count)
    return steps


def _is_done(folder: Path) -> bool:
    return read_done(folder) is not None


def _shared_stage(name: str, settings: Settings, count: int) -> Callable[[], object]:
    work = functools.partial(_ended, getattr(stages, name), shared_by_ranks(settings, name, count))
    return functools.partial(ranks, count, work)


def _ended(work: Callable[..., object], *args: Any) -> None:
    """In a child: errors of users are a sentence in its log, as on the command line."""
    try:
        user_errors(work)(*args)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)


def run(
    config: Path | None,
    overrides: list[str],
    *,
    train: int = 12_000,
    evaluation: int = 600,
    pictures: Path | None = None,
    held_out_style: str | None = None,
    start: Path | None = None,
    cores: int | None = None,
) -> Path:
    """Runs every stage that is not done yet, those that do not wait for one another side by side; returns the page.

    cores: how many to keep busy; None: those that this process may use.
    """
    settings = quickstart_settings(config, overrides)
    world: dict[str, Any] = {"train": train, "evaluation": evaluation}
    world |= {"pictures": pictures, "held_out_style": held_out_style}
    steps = steps_of(settings, world, start, RANKS)
    for name, step in steps.items():
        after = f" (after {', '.join(step.after)})" if step.after else ""
        plain(f"{name:7} {TITLES[name]}{after}")
    begin = time.monotonic()
    _run_side_by_side(settings, steps, cores or len(os.sched_getaffinity(0)))
    plain(f"{'report':7} {TITLES['report']}")
    one_thread()
    page = Path(stages.evaluate(settings)["report"])
    plain(f"{time.monotonic() - begin:.0f} s in all")
    return _close(page)


def _run_side_by_side(settings: Settings, steps: dict[str, Step], cores: int) -> None:
    """One process more than there are cores, so that three stages of a process each leave none of two cores idle."""
    logs = Path(settings.output_dir, "logs")
    jobs = [
        Job(
            name=name,
            kind=name,
            command=functools.partial(_ended, step.work),
            log=logs / f"{name}.log",
            done=step.done,
            after=step.after,
            progress=functools.partial(_share, settings, name, logs / f"{name}.log"),
            cores=step.cores,
        )
        for name, step in steps.items()
    ]
    with LiveWatcher(console, len(jobs)) as watcher:
        outcomes = run_jobs(jobs, cores + (cores > 1), watcher, THREADS)
    if bad := [name for name, outcome in outcomes.items() if outcome.state == "failed"]:
        raise SettingsError(f"{bad[0]} failed, its last lines stand above; all of them: {logs / bad[0]}.log")


def _share(settings: Settings, name: str, log: Path) -> float | None:
    """How far a stage is, by the last step in its metrics or the last place in its log."""
    if name == "policy":
        return share_of_steps(Path(settings.output_dir, name), settings.policy.max_steps)
    if not log.is_file():
        return None
    places = PLACE.findall(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    return int(places[-1][0]) / int(places[-1][1]) if places else None


def _close(page: Path) -> Path:
    """Show the demo's bars against its report.json, and where the page is."""
    bars = resources.files("safe_rlhf_v.demo").joinpath("quickstart_bars.yaml")
    with resources.as_file(bars) as file:
        print_outcomes(check(page.with_name("report.json"), file), console)
    plain(f"report: {page}  (open it in a browser)")
    return page
