"""The demo: one world, one small model, every stage, one report."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from rich.text import Text

from safe_rlhf_v.cli import stages
from safe_rlhf_v.cli.common import console, plain
from safe_rlhf_v.cli.stage_folder import run_stage
from safe_rlhf_v.config import Settings, load_settings
from safe_rlhf_v.evaluation.bars import check, print_outcomes

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


def quickstart_settings(config: Path | None, overrides: list[str]) -> Settings:
    """The demo's own settings, or a file's, with overrides; model and data are made below output_dir unless given."""
    packaged = resources.files("safe_rlhf_v.cli").joinpath("quickstart.yaml")
    with resources.as_file(packaged) as path:
        settings = load_settings(config or path, overrides)
    output = Path(settings.output_dir)
    settings.model.path = settings.model.path or str(output / "start")
    settings.data.path = settings.data.path or str(output / "data")
    return settings


def make_world(settings: Settings, **world: Any) -> None:
    """Draw the picture world to <output_dir>/data, unless it is there. world: arguments of picture_world.write."""
    from beavertails_v.picture_world import write

    def work(folder: Path) -> dict[str, Any]:
        write(folder, seed=settings.seed, **world)
        return {}

    run_stage("data", settings, [], work, **world)


def make_start(settings: Settings, start: Path | None = None) -> None:
    """The picture world's start model to <output_dir>/start, unless it is there."""
    from safe_rlhf_v.models.tiny import write_picture_world_model

    def work(folder: Path) -> dict[str, Any]:
        write_picture_world_model(folder, start=start)
        return {}

    run_stage("start", settings, [], work, given=start)


def run(
    config: Path | None,
    overrides: list[str],
    *,
    train: int = 12_000,
    evaluation: int = 600,
    pictures: Path | None = None,
    held_out_style: str | None = None,
    start: Path | None = None,
) -> Path:
    """Runs every stage that is not done yet and returns the page of the report."""
    settings = quickstart_settings(config, overrides)
    begin = time.monotonic()

    world: dict[str, Any] = {"train": train, "evaluation": evaluation}
    world |= {"pictures": pictures, "held_out_style": held_out_style}
    made_here = settings.data.path == str(Path(settings.output_dir) / "data")
    started_here = settings.model.path == str(Path(settings.output_dir) / "start")
    steps: dict[str, Callable[[], Any]] = {}
    steps |= {"data": functools.partial(make_world, settings, **world)} if made_here else {}
    steps |= {"start": functools.partial(make_start, settings, start)} if started_here else {}
    for name in ("sft", "reward", "cost", "guard", "policy"):
        steps[name] = functools.partial(getattr(stages, name), settings)
    result: dict[str, Any] = {}
    steps["report"] = lambda: result.update(stages.evaluate(settings))
    for number, (name, step) in enumerate(steps.items(), 1):
        console.rule(Text(f"{number}/{len(steps)}  {TITLES[name]}", "bold"), align="left")
        step()
        plain(f"{time.monotonic() - begin:.0f} s so far")
    return _close(Path(result["report"]))


def _close(page: Path) -> Path:
    """Show the demo's bars against its report.json, and where the page is."""
    bars = resources.files("safe_rlhf_v.cli").joinpath("quickstart_bars.yaml")
    with resources.as_file(bars) as file:
        print_outcomes(check(page.with_name("report.json"), file), console)
    plain(f"report: {page}  (open it in a browser)")
    return page
