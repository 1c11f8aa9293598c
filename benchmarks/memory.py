"""Predicted against measured peak memory of real stages, side by side, on this machine's CPU.

    python benchmarks/memory.py [--json]

Measured: the bytes of all tensors alive at once while the stage's own trainer runs (`Allocations`), and by how much
the process grew (VmHWM, which also holds what libraries keep; a fresh process a case). Rows have the longest length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from beavertails_v.images import Picture
from beavertails_v.picture_world import vocabulary
from beavertails_v.schema import Comparison, Prompt, Response
from safe_rlhf_v.config import ModelSection, Settings, load_settings
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.online.loop import OnlineTrainer
from safe_rlhf_v.planning import stages as memory
from safe_rlhf_v.planning.allocations import Allocations
from safe_rlhf_v.training.trainers import SupervisedTrainer

QUESTION, ANSWER = 40, 30  # words; a word is a token
CASES: dict[str, tuple[str, list[str]]] = {
    "reward, full weights": ("reward", ["reward.use_lora=false"]),
    "reward, adapters": ("reward", []),
    "reward, adapters, checkpointing": ("reward", ["reward.gradient_checkpointing=true"]),
    "sft, full weights": ("sft", []),
    "policy, adapters": ("policy", ["policy.roles=adapters"]),
    "policy, separate models": ("policy", ["policy.roles=separate", "reward.use_lora=false", "cost.use_lora=false"]),
    "policy, adapters, no critics": ("policy", ["policy.algorithm=group_lag", "policy.num_generations=2"]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes. tensors: alive at once; process: by how much it grew."""

    case: str
    predicted: int
    tensors: int
    process: int


def pairs(count: int) -> list[Comparison]:
    """Pairs whose questions have QUESTION words and whose answers ANSWER words."""
    words = [word for word in vocabulary() if word.isalpha()]
    picture = Picture.from_pil(Image.new("RGB", (64, 64), (200, 20, 20)))

    def text(start: int, length: int) -> str:
        return " ".join(words[(start + i) % len(words)] for i in range(length))

    def pair(i: int) -> Comparison:
        said = (Response(text=text(i, ANSWER), safe=True, harmless_rate=2, helpful_rate=1),
                Response(text=text(i + 7, ANSWER), safe=False, harmless_rate=-2, helpful_rate=2))  # fmt: skip
        prompt = Prompt(text=text(3 * i, QUESTION), images=(picture,), category="violence_and_physical_harm")
        return Comparison(prompt=prompt, responses=said, more_helpful=1, safer=0)

    return [pair(i) for i in range(count)]


def base_model(folder: Path, width: int = 128, layers: int = 4) -> Path:
    model, processor = tiny_llava(vocabulary(), hidden_size=width, layers=layers)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def settings_of(base: Path, output_dir: Path, overrides: Sequence[str]) -> Settings:
    small = [f"{stage}.{x}" for stage in ("sft", "reward", "cost") for x in ("max_steps=2", "save_steps=100")]
    policy = ["max_steps=2", f"max_new_tokens={ANSWER}", "ptx_coeff=0", "guidance_rollouts=0", "save_steps=100"]
    named = [f"model.path={base}", f"output_dir={output_dir}", *small, *(f"policy.{x}" for x in policy), *overrides]
    return load_settings(None, named)


def planned_model(model: ModelSection, base: Path) -> memory.PlannedModel:
    from safe_rlhf_v.vlm.processing import Encoder, load_processor

    encoder, row = Encoder(load_processor(base)), pairs(1)[0]
    prompt, answer = encoder.prompts([row.prompt]), encoder.responses([row.responses[0].text])
    planned = memory.planned_model(model, base, prompt.input_ids.shape[1])
    return replace(planned, response=answer.ids.shape[1])


def measure(case: str, folder: Path) -> Measured:
    """Run one case in this process."""

    stage, overrides = CASES[case]
    base = base_model(folder / "base")
    settings = settings_of(base, folder / "run", overrides)
    planned = planned_model(settings.model, base)
    if stage == "policy":
        predicted = memory.policy(settings.policy, planned, critics=settings.policy.made().critics is not None)
    else:
        predicted = memory.supervised(stage, getattr(settings, stage), planned)
    run = _policy if stage == "policy" else _supervised
    before = _resident()
    tensors = run(settings, stage, base, folder)
    return Measured(case=case, predicted=predicted.peak, tensors=tensors, process=_resident() - before)


def _supervised(settings: Settings, stage: str, base: Path, folder: Path) -> int:
    from safe_rlhf_v.stages import build
    from safe_rlhf_v.training.supervised import train_preference_model, train_sft

    section, setup = getattr(settings, stage), build.setup(settings)
    peaks: list[int] = []
    real = SupervisedTrainer.train

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Allocations(held=_tensors([self.model])) as seen:
            result = real(self, *args, **kwargs)
        peaks.append(seen.peak)
        return result

    SupervisedTrainer.train = counted  # type: ignore[method-assign]
    try:
        if stage == "sft":
            train_sft(pairs(8), pairs(2), base, folder / stage, section, setup)
        else:
            train_preference_model(stage, pairs(8), pairs(2), base, folder / stage, section, setup)  # type: ignore[arg-type]
    finally:
        SupervisedTrainer.train = real  # type: ignore[method-assign]
    return peaks[0]


def _policy(settings: Settings, stage: str, base: Path, folder: Path) -> int:
    from safe_rlhf_v.stages import build
    from safe_rlhf_v.training.supervised import lora_settings
    from safe_rlhf_v.vlm.backbone import load_backbone
    from safe_rlhf_v.vlm.heads import HeadedModel

    for kind in ("reward", "cost"):
        lora = lora_settings(settings.model) if getattr(settings, kind).use_lora else None
        HeadedModel(load_backbone(base), {"score": 1}, lora).save_pretrained(folder / kind)
    roles: Any = build.roles(settings.policy, settings.model, str(base), str(folder / "reward"), str(folder / "cost"))
    roles.encoder.eos_id = -1  # answers run to the limit, as the prediction has them
    prompts = [pair.prompt for pair in pairs(8)]
    methods = settings.policy.made(threshold=0.0), settings.policy.constraint(0.0)
    arguments = settings.policy.arguments(folder / "policy", settings.seed)
    trainer = OnlineTrainer(roles, *methods, prompts, arguments)
    models = roles.models.values() if settings.policy.roles == "separate" else [roles.backbone]
    with Allocations(held=_tensors(models)) as seen:
        trainer.train()
    return seen.peak


def _tensors(models: Any) -> list[torch.Tensor]:
    return [tensor for model in models for tensor in (*_module(model).parameters(), *_module(model).buffers())]


def _module(model: Any) -> nn.Module:
    return model  # type: ignore[no-any-return]


def _resident() -> int:
    """Largest resident size of this process so far, bytes."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _in_a_process(case: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        return measure(case, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a case")
    wanted = parser.parse_args()
    print(f"{'case':34} {'predicted':>12} {'tensors':>12} {'error':>8} {'process':>12}", file=sys.stderr)
    for case in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(_in_a_process, (case,))
        mib = [x / 2**20 for x in (found.predicted, found.tensors, found.process)]
        if wanted.json:
            print(json.dumps({"case": case, "predicted": found.predicted, "tensors": found.tensors,
                              "process": found.process}), flush=True)  # fmt: skip
        else:
            error = found.predicted / found.tensors - 1
            print(f"{case:34} {mib[0]:8.2f} MiB {mib[1]:8.2f} MiB {error:+7.1%} {mib[2]:8.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
