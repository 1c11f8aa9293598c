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
from typing import Literal

import torch
from packaging.requirements import Requirement

from beavertails_v import ComparisonSet, load_comparisons
from safe_rlhf_v.config import Settings
from safe_rlhf_v.errors import is_user_error
from safe_rlhf_v.planning.footprint import meta_model
from safe_rlhf_v.planning.stages import StageMemory, planned_model, policy, supervised
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.data import Split, load
from safe_rlhf_v.stages.folder import require_writable
from safe_rlhf_v.training.encode import fault, pair_rows, thorough
from safe_rlhf_v.vlm.preflight import preflight
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.quirks import UNJOINABLE
from safe_rlhf_v.vlm.source import ModelError

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
    run = Examined(settings, machine, model_config or settings.model.start or settings.model.path)
    looks: dict[str, Callable[[], tuple[Outcome, str]]] = {
        "versions": _versions,
        "device": run.device,
        "output_dir": run.output,
        "model": run.model,
        "data": run.data,
    }
    checks = {name: _checked(name, look) for name, look in looks.items()}
    failed: list[Check] = []
    if checks["model"].outcome != "error":
        tried = [_checked(stage, partial(run.predict, stage, prompt_tokens)) for stage in stages]
        failed = [check for check in tried if check.outcome == "error"]
    return Report(checks=[*checks.values(), *failed], stages=run.stages, machine=machine)


class Examined:
    """A run that is looked at from one side after another; what one look leaves serves the next."""

    def __init__(self, settings: Settings, machine: Machine, source: str) -> None:
        self.settings, self.machine, self.source = settings, machine, source
        self.encoder: Encoder | None = None
        self.longest = 0
        """Tokens of the longest prompt measured, 0 where none was."""
        self.stages: list[StageMemory] = []

    def device(self) -> tuple[Outcome, str]:
        found = torch.cuda.device_count()
        what = f"{found} x {torch.cuda.get_device_name(0)}" if found else "no GPU here"
        if self.settings.model.quantization and not installed("bitsandbytes"):
            return "error", f"{what}; model.quantization needs bitsandbytes: pip install bitsandbytes"
        if found and self.settings.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
            return "error", f"{what} has no bfloat16: use model.dtype: float16"
        if self.machine.memory is None:
            return "warning", f"{what}; give --memory GIB to plan for one"
        return "ok", f"{what}; planned for {self.machine.devices} x {self.machine.memory / GIB:.0f} GiB"

    def output(self) -> tuple[Outcome, str]:
        folder = Path(self.settings.output_dir)
        require_writable(folder)
        return "ok", f"{folder}: {shutil.disk_usage(folder).free / GIB:.0f} GiB free"

    def model(self) -> tuple[Outcome, str]:
        source, section = self.source, self.settings.model
        if not source:
            raise ModelError("model.path is not set: give a folder or hub id, or --model-config FOLDER")
        model = meta_model(source, section.dtype)
        kind = model.config.model_type
        if kind in UNJOINABLE:
            return "error", f"model type {kind} is not supported: {UNJOINABLE[kind]}"
        detail = f"{kind}, {sum(p.numel() for p in model.parameters()) / 1e9:.3g} billion parameters"
        folder = Path(source)
        if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            return "warning", f"{detail}; {folder} holds a config and no weights"
        self.encoder = preflight(source)
        self.encoder.max_prompt_length = section.max_prompt_length
        self.encoder.max_response_length = section.max_response_length
        return "ok", detail

    def data(self) -> tuple[Outcome, str]:
        data = self.settings.data
        if data.path and HUB_ID.fullmatch(data.path) and not Path(data.path).exists():
            return "warning", f"{data.path}: not a folder or file here, so taken for a hub id and not looked at"
        counts = []
        splits: dict[Split, str] = {"train": data.train_split, "evaluation": data.evaluation_split}
        for split, name in splits.items():
            found = load(load_comparisons, self.settings.data, split)
            counts.append(f"{name} {self._counted(found, split)}")
        return "ok", ", ".join(counts)

    def _counted(self, found: ComparisonSet, split: str) -> str:
        """Pairs as reward and cost are trained on them; and measures the longest of at most `MEASURED` prompts, spread
        over all.
        """
        if self.encoder is None:
            return f"{len(found)} pairs, {len(found.report.dropped)} left out"
        every = thorough(self.encoder)
        for i in range(0, len(found), -(-len(found) // MEASURED)):
            prompt = found[i].prompt
            if fault(prompt, [], every) is None:
                self.longest = max(self.longest, self.encoder.prompts([prompt]).input_ids.shape[1])
        opened = split == "evaluation" or build.setup(self.settings).opens_pictures
        rows = pair_rows(found, every if opened else self.encoder)
        return f"{len(rows)} pairs, {len(found.report.dropped) + len(rows.left_out)} left out"

    def predict(self, stage: str, prompt_tokens: int | None) -> tuple[Outcome, str]:
        longest = self.longest if self.settings.model.max_prompt_length is None else None
        model = planned_model(self.settings.model, self.source, prompt_tokens or longest)
        if stage == "policy":
            section, devices = self.settings.policy, self.machine.devices if self.machine.sharded else 1
            self.stages.append(policy(section, model, devices, critics=section.made().critics is not None))
        else:
            self.stages.append(supervised(stage, getattr(self.settings, stage), model))
        return "ok", ""


def _checked(name: str, look: Callable[[], tuple[Outcome, str]]) -> Check:
    """What a look finds; a user's error becomes its outcome."""
    try:
        outcome, detail = look()
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


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
