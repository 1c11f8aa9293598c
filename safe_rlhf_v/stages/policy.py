"""The stage `policy`: constrained training of the policy against the reward and cost model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from safe_rlhf_v.config import Settings
from safe_rlhf_v.online.loop import OnlineResult, OnlineTrainer
from safe_rlhf_v.stages import build, data
from safe_rlhf_v.stages.folder import StageResult
from safe_rlhf_v.stages.models import judges, look_first, start_model
from safe_rlhf_v.stages.stage import Plan
from safe_rlhf_v.stages.threshold import show_suggestions, threshold, warn_of_judges
from safe_rlhf_v.training.encode import LeftOut, list_left_out, thorough

SHOWN = ("reward", "cost", "violation", "multiplier", "kl", "unsafe_share", "response_length")


def policy(settings: Settings) -> Plan:
    """The folder itself loads as a model."""
    start, section = start_model(settings.model, settings.output_dir), settings.policy
    reward, cost = judges(settings.output_dir, section, "policy").values()

    def work(folder: Path) -> StageResult:
        look_first(settings.data, start)
        warn_of_judges(reward, cost)
        bound = threshold(section, cost)
        if section.guidance_rollouts and section.takes_threshold:
            show_suggestions(bound, Path(cost), folder)
        pairs, setup = data.comparisons(settings.data, "train"), build.setup(settings)
        set_seed(setup.seed)  # fresh adapters: the same on every rank, and whichever stages ran before in this process
        roles = build.roles(section, setup.model, start, reward, cost)
        gate = thorough(roles.encoder) if setup.opens_pictures else roles.encoder
        prompts, left_out = data.readable(pairs, gate)
        shown, unused = None, list[LeftOut]()
        if section.ptx_coeff:
            pick = section.demonstrations or settings.sft.responses
            shown, unused = data.demonstrations(pairs, pick, roles.encoder, setup.model.max_response_length)
        list_left_out(folder, left_out + unused)
        trainer = OnlineTrainer(
            roles,
            section.made(threshold=bound),
            section.constraint(bound),
            prompts,
            section.arguments(folder, setup.seed),
            demonstrations=shown,
            engine=build.engine(section.engine, setup, start, roles, folder),
        )
        result = trainer.train(resume_from_checkpoint="auto")
        if trainer.accelerator.is_main_process:
            _move_up(result.policy_dir, folder)
        trainer.accelerator.wait_for_everyone()
        measured: dict[str, Any] = {"steps": result.steps, "threshold": bound, "algorithm": section.algorithm}
        measured |= {"prompts": len(prompts), "left_out": len(left_out), "last_step": _last(result)}
        return StageResult(measured=measured, base=start)

    return Plan(work=work, inputs={"start": start, "reward": reward, "cost": cost})


def _last(result: OnlineResult) -> dict[str, Any]:
    return {name: result.metrics[-1][name] for name in SHOWN if name in result.metrics[-1]}


def _move_up(source: Path, folder: Path) -> None:
    """The policy's files into the stage's folder, so that this one loads as a model; adapters of past rollouts go."""
    for path in source.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(source)
    for sent in folder.glob("vllm-*"):
        shutil.rmtree(sent)
