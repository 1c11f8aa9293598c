"""The multiplier of a direct method that bounds the policy's own cost: answers are drawn and scored, and it moves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from beavertails_v.schema import Prompt
from safe_rlhf_v.direct.trainer import DirectTrainer
from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.vlm.backbone import encode_images
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder

log = logging.getLogger(__name__)


class CostAscent(TrainerCallback):
    """Every algorithm.dual_steps optimizer steps: mean cost of the policy's own answers, then a step of the multiplier.

    Answers are drawn with seeds of their own, so that a resumed run draws the same.
    """

    def __init__(self, trainer: DirectTrainer, prompts: Sequence[Prompt], encoder: Encoder, cost: HeadedModel) -> None:
        self.trainer, self.prompts, self.encoder, self.cost = trainer, prompts, encoder, cost
        assert trainer.constraint is not None
        self.constraint = trainer.constraint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn where the run is too short for one move."""
        algorithm: Any = self.trainer.algorithm
        if state.max_steps < algorithm.dual_steps and math.isfinite(self.constraint.watch.maximum):
            log.warning(
                "dual_steps %d is more than the %d steps of this run: the multiplier stays at %g. Lower dual_steps, or "
                "train longer.",
                algorithm.dual_steps, state.max_steps, algorithm.multiplier,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        algorithm: Any = self.trainer.algorithm
        if state.global_step % algorithm.dual_steps:
            return
        costs = self.trainer.accelerator.gather(self._costs(args, state.global_step))
        multiplier, violation = self.constraint.observe(costs, state.global_step)
        self.trainer.take_multiplier()
        self.trainer.log({"mean_cost": costs.mean().item(), "violation": violation, "multiplier": multiplier})

    @torch.no_grad()
    def _costs(self, args: Any, step: int) -> Tensor:
        """(n,) costs of answers to this rank's share of algorithm.dual_prompts prompts."""
        algorithm: Any = self.trainer.algorithm
        share, batch = max(1, algorithm.dual_prompts // args.world_size), args.per_device_eval_batch_size
        sampling = Sampling(max_new_tokens=algorithm.max_new_tokens)
        engine = TransformersEngine(self.trainer.backbone, self.encoder)
        found = []
        with torch.random.fork_rng():
            torch.manual_seed(hash((args.seed, step, args.process_index)) % 2**63)
            chosen = torch.randint(len(self.prompts), (share,)).tolist()
            for rows in (chosen[start : start + batch] for start in range(0, share, batch)):
                inputs = self.encoder.prompts([self.prompts[i] for i in rows]).to(args.device)
                responses = engine.generate(self.trainer.features(inputs), 1, sampling)
                scores = self.cost(encode_images(self.cost.backbone, inputs), responses)["score"]  # (n, 1)
                found.append(scores.squeeze(-1))
        return torch.cat(found)
