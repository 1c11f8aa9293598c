"""The demo: one world, one small model, every stage, one report."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from safe_rlhf_v.stages.evaluate import evaluate
from safe_rlhf_v.stages.folder import read_done, run_stage
from safe_rlhf_v.stages.stages import STAGES

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


@dataclass(frozen=True, kw_only=True)
class Demo:
    """world: arguments of picture_world.write; start: a start model's weights instead of those that ship."""

    settings: Settings
    world: Mapping[str, Any] = field(default_factory=dict)
    start: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @cached_property
    def steps(self) -> dict[str, Step]:
        """Every part that is made here, in an order in which each stands after those it reads."""
        steps: dict[str, Step] = {}

        def add(name: str, work: Callable[[], object], *after: str, cores: int = 1) -> None:
            done = partial(_is_done, self.folder / name)
            steps[name] = Step(work=work, done=done, after=tuple(a for a in after if a in steps), cores=cores)

        if self.settings.data.path == str(self.folder / "data"):
            add("data", partial(make_world, self.settings, workers=RANKS, **self.world), cores=RANKS)
        if self.settings.model.path == str(self.folder / "start"):
            add("start", partial(make_start, self.settings, self.start))
        add("sft", self._by_ranks("sft"), "data", "start", cores=RANKS)
        for name in ("reward", "cost", "guard"):
            add(name, partial(STAGES[name].run, self.settings), "sft")
        add("policy", self._by_ranks("policy"), "reward", "cost", cores=RANKS)
        return steps

    def _by_ranks(self, name: str) -> Callable[[], object]:
        work = partial(_ended, STAGES[name].run, shared_by_ranks(self.settings, name, RANKS))
        return partial(ranks, RANKS, work)

    def run(self, cores: int) -> None:
        """One process more than there are cores, so that three stages of a process each leave none of two cores idle.

        Raises SettingsError where a part fails.
        """
        jobs = [self._job(name, step) for name, step in self.steps.items()]
        with LiveWatcher(console, len(jobs)) as watcher:
            outcomes = run_jobs(jobs, cores + (cores > 1), watcher, THREADS)
        if bad := [name for name, outcome in outcomes.items() if outcome.state == "failed"]:
            log = self.folder / "logs" / f"{bad[0]}.log"
            raise SettingsError(f"{bad[0]} failed, its last lines stand above; all of them: {log}")

    def _job(self, name: str, step: Step) -> Job:
        log = self.folder / "logs" / f"{name}.log"
        progress = partial(_share, log)
        if name == "policy":
            progress = partial(share_of_steps, self.folder / name, self.settings.policy.max_steps)
        command = partial(_ended, step.work)
        return Job(
            name=name,
            kind=name,
            command=command,
            log=log,
            done=step.done,
            after=step.after,
            progress=progress,
            cores=step.cores,
        )


def _is_done(folder: Path) -> bool:
    return read_done(folder) is not None


def _share(log: Path) -> float | None:
    """How far a stage is, by the last place in its log."""
    if not log.is_file():
        return None
    places = PLACE.findall(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    return int(places[-1][0]) / int(places[-1][1]) if places else None


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
    world = {"train": train, "evaluation": evaluation, "pictures": pictures, "held_out_style": held_out_style}
    demo = Demo(settings=quickstart_settings(config, overrides), world=world, start=start)
    for name, step in demo.steps.items():
        after = f" (after {', '.join(step.after)})" if step.after else ""
        plain(f"{name:7} {TITLES[name]}{after}")
    begin = time.monotonic()
    demo.run(cores or len(os.sched_getaffinity(0)))
    plain(f"{'report':7} {TITLES['report']}")
    one_thread()
    page = Path(evaluate(demo.settings)["report"])
    plain(f"{time.monotonic() - begin:.0f} s in all")
    return _close(page)


def _close(page: Path) -> Path:
    """Show the demo's bars against its report.json, and where the page is."""
    bars = resources.files("safe_rlhf_v.demo").joinpath("quickstart_bars.yaml")
    with resources.as_file(bars) as file:
        print_outcomes(check(page.with_name("report.json"), file), console)
    plain(f"report: {page}  (open it in a browser)")
    return page
