"""`safe-rlhf-v doctor`: whether a run can work here, or on a machine that is not rented yet, before it starts."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from beavertails_v import ComparisonSet, load_comparisons
from safe_rlhf_v.config import Settings
from safe_rlhf_v.console import console
from safe_rlhf_v.errors import is_user_error
from safe_rlhf_v.models.preflight import preflight
from safe_rlhf_v.models.processing import Encoder
from safe_rlhf_v.models.quirks import UNJOINABLE
from safe_rlhf_v.models.source import ModelError
from safe_rlhf_v.planning import stages as memory
from safe_rlhf_v.planning.footprint import meta_model
from safe_rlhf_v.planning.stages import StageMemory
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.folder import require_writable
from safe_rlhf_v.training.encode import fault, pair_rows
from safe_rlhf_v.training.supervised import opens_pictures

GIB = 2**30
STAGES = ("sft", "reward", "cost", "policy")
OTHERS = ("guard", "direct", "iterative")  # looked at where the settings speak of them
MEASURED = 512  # prompts that are encoded to find the longest
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Outcome = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is planned for. memory: bytes of a device, or None for a CPU. sharded: FSDP2 over all devices."""

    devices: int = 1
    memory: int | None = None
    sharded: bool = False
    reserve: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    outcome: Outcome
    detail: str


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one look leaves for the next. prompt_tokens: of the longest prompt measured, 0 where none was."""

    encoder: Encoder | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    checks: Sequence[Check]
    stages: Sequence[StageMemory]
    machine: Machine

    def fits(self, stage: StageMemory) -> bool | None:
        """Whether the predicted peak leaves the reserve free; None where the device's memory is unknown."""
        limit = self.machine.memory
        return None if limit is None else stage.peak <= limit * (1 - self.machine.reserve)

    @property
    def passed(self) -> bool:
        failed = any(check.outcome == "error" for check in self.checks)
        return not failed and not any(self.fits(stage) is False for stage in self.stages)


def stages_of(settings: Settings) -> list[str]:
    """The stages of a run, and the others that its settings speak of."""
    return [*STAGES, *(stage for stage in OTHERS if stage in settings.model_fields_set)]


def this_machine(devices: int | None, gib: float | None, sharded: bool, reserve: float) -> Machine:
    """The GPUs found here, where neither their number nor their memory is given."""
    found = torch.cuda.device_count()
    limit = int(gib * GIB) if gib else torch.cuda.get_device_properties(0).total_memory if found else None
    return Machine(devices=devices or max(1, found), memory=limit, sharded=sharded, reserve=reserve)


def examine(
    settings: Settings,
    machine: Machine,
    *,
    stages: Sequence[str] = STAGES,
    model_config: str | None = None,
    prompt_tokens: int | None = None,
) -> Report:
    """Check versions, device, output folder, model and data, and predict each stage's memory.

    model_config: a folder with a config.json in place of model.path, which then need not be there.
    """
    source = model_config or settings.model.start or settings.model.path
    seen = Seen()
    steps: list[tuple[str, Callable[[], tuple[Outcome, str]]]] = [
        ("versions", _versions),
        ("device", lambda: _device(settings, machine)),
        ("output_dir", lambda: _output(settings)),
        ("model", lambda: _model(source, settings, seen)),
        ("data", lambda: _data(settings, seen)),
    ]
    checks = {name: _checked(name, look) for name, look in steps}
    found: list[StageMemory] = []
    longest = seen.prompt_tokens if settings.model.max_prompt_length is None else None

    def predict(stage: str) -> None:
        found.append(_predict(settings, stage, source, machine, prompt_tokens or longest))

    failed: list[Check] = []
    if checks["model"].outcome != "error":
        tried = [_checked(stage, partial(predict, stage)) for stage in stages]
        failed = [check for check in tried if check.outcome == "error"]
    return Report(checks=[*checks.values(), *failed], stages=found, machine=machine)


def _predict(settings: Settings, stage: str, source: str, machine: Machine, prompt_tokens: int | None) -> StageMemory:
    at = memory.lengths(settings, prompt_tokens)
    if stage == "policy":
        return memory.policy(
            settings, source, at, machine.devices, machine.sharded, critics=build.needs_critics(settings)
        )
    return memory.supervised(settings, stage, source, at)


def _checked(name: str, look: Callable[[], Any]) -> Check:
    """What a look finds; a user's error becomes its outcome."""
    try:
        found: tuple[Outcome, str] = look() or ("ok", "")
        outcome, detail = found
    except Exception as error:
        if not is_user_error(error):
            raise
        outcome, detail = "error", str(error).strip()
    return Check(name=name, outcome=outcome, detail=detail)


def _versions() -> tuple[Outcome, str]:
    wrong = []
    for text in requires("safe-rlhf-v") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            have = "missing"
        if have == "missing" or not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have}, wanted {need.specifier}")
    main = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))
    return ("error", "; ".join(wrong)) if wrong else ("ok", main)


def _device(settings: Settings, machine: Machine) -> tuple[Outcome, str]:
    found = torch.cuda.device_count()
    what = f"{found} x {torch.cuda.get_device_name(0)}" if found else "no GPU here"
    if settings.model.quantization and not installed("bitsandbytes"):
        return "error", f"{what}; model.quantization needs bitsandbytes: pip install bitsandbytes"
    if found and settings.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        return "error", f"{what} has no bfloat16: use model.dtype: float16"
    if machine.memory is None:
        return "warning", f"{what}; give --memory GIB to plan for one"
    return "ok", f"{what}; planned for {machine.devices} x {machine.memory / GIB:.0f} GiB"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _output(settings: Settings) -> tuple[Outcome, str]:
    folder = Path(settings.output_dir)
    require_writable(folder)
    return "ok", f"{folder}: {shutil.disk_usage(folder).free / GIB:.0f} GiB free"


def _model(source: str, settings: Settings, seen: Seen) -> tuple[Outcome, str]:
    if not source:
        raise ModelError("model.path is not set: give a folder or hub id, or --model-config FOLDER")
    model = meta_model(source, settings.model.dtype)
    kind = model.config.model_type
    if kind in UNJOINABLE:
        return "error", f"model type {kind} is not supported: {UNJOINABLE[kind]}"
    detail = f"{kind}, {sum(p.numel() for p in model.parameters()) / 1e9:.3g} billion parameters"
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "warning", f"{detail}; {folder} holds a config and no weights"
    seen.encoder = preflight(source)
    seen.encoder.max_prompt_length = settings.model.max_prompt_length
    seen.encoder.max_response_length = settings.model.max_response_length
    return "ok", detail


def _data(settings: Settings, seen: Seen) -> tuple[Outcome, str]:
    data = settings.data
    if data.path and HUB_ID.fullmatch(data.path) and not Path(data.path).exists():
        return "warning", f"{data.path}: not a folder or file here, so taken for a hub id and not looked at"
    counts = []
    splits: tuple[tuple[build.Split, str], ...] = (("train", data.train_split), ("evaluation", data.evaluation_split))
    for split, name in splits:
        found = build.load(load_comparisons, settings, split)
        counts.append(f"{name} {_counted(found, settings, split, seen)}")
    return "ok", ", ".join(counts)


def _counted(found: ComparisonSet, settings: Settings, split: str, seen: Seen) -> str:
    """Pairs as reward and cost are trained on them; and the longest prompt of at most `MEASURED`, spread over all."""
    if seen.encoder is None:
        return f"{len(found)} pairs, {len(found.report.dropped)} left out"
    every = -(-len(found) // MEASURED)
    for i in range(0, len(found), every):
        prompt = found[i].prompt
        if fault(prompt, [], seen.encoder, thorough=True) is None:
            seen.prompt_tokens = max(seen.prompt_tokens, seen.encoder.prompts([prompt]).input_ids.shape[1])
    rows = pair_rows(found, seen.encoder, thorough=split == "evaluation" or opens_pictures(settings))
    return f"{len(rows)} pairs, {len(found.report.dropped) + len(rows.left_out)} left out"


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
