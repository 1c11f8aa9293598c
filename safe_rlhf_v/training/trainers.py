"""The trainers of the supervised stages on transformers.Trainer: fine-tuning, reward and cost models.

So arguments, callbacks, trackers, sharding and resuming are those users know. What is ours: a batch is a dict of the
dataclasses in `types`; checkpoints hold what is trained and nothing frozen; a loss that is not finite is an error.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from safe_rlhf_v.distributed.fsdp2 import (
    make_whole,
    optimizer_part,
    part_of,
    refuse_several_forwards,
    sharding_of_launch,
    whole_tree,
)
from safe_rlhf_v.losses import token_cross_entropy
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.training.checkpoint import CheckpointError, resuming
from safe_rlhf_v.training.encode import interleaved
from safe_rlhf_v.training.preference_metrics import cost_metrics, reward_metrics
from safe_rlhf_v.training.records import is_complete
from safe_rlhf_v.training.runtime import NotFinite
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import encode_images, output_head, vision_is_frozen
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.image_features import VisionCache
from safe_rlhf_v.vlm.shared_prompts import response_states
from safe_rlhf_v.vlm.weights import read_tensors

WEIGHTS = "model.safetensors"  # the name Trainer knows


class SupervisedTrainer(Trainer):
    """Trainer for batches of our dataclasses. A subclass gives `loss(model, batch) -> (loss, metrics)`.

    Launched under FSDP2 it cuts the model at once; checkpoints are those of one process all the same.
    """

    backbone: Any  # of the unwrapped model: frozen pictures are encoded outside the wrapped forward
    pictures: VisionCache | None = None  # keeps image features between steps

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # without a launcher several GPUs mean DataParallel, which splits tensors only
        self.cut = shard_for_launch(model, args)
        hidden = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_PARALLELISM_CONFIG": "false"} if self.cut else {}
        with patch_environment(**hidden):  # accelerate would cut the model once more, on GPUs
            super().__init__(model, args, **kwargs)
        if self.cut:  # neither wrapped in DDP nor under autocast
            self.accelerator.prepare_model = lambda model, **_: model  # type: ignore[method-assign]
        self._sums: dict[str, list[float]] = defaultdict(list)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss, metrics = self.loss(model, inputs)
        if not math.isfinite(loss.item()):
            raise NotFinite(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: lower learning_rate, "
                "or load the model in float32"
            )
        for name, value in metrics.items():
            self._sums[name].append(value)
        return (loss, {}) if return_outputs else loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return {name: value.to(self.args.device) for name, value in inputs.items()}

    def features(self, prompts: Inputs) -> Inputs:
        """Prompts with image features where the tower is frozen, so that a picture is encoded once a step."""
        if self.cut:
            refuse_several_forwards(prompts)
        return encode_images(self.backbone, prompts, self.pictures) if vision_is_frozen(self.backbone) else prompts

    def make_whole(self) -> None:
        """After training and measuring, on every rank: the main one may then save the model, which no longer runs."""
        if self.cut:
            make_whole(self.model, keep=self.is_world_process_zero())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            self._sums.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer; of a cut model what is trained is made whole, and the rest not even gathered."""
        if not self.cut:
            return super().save_model(output_dir, _internal_call)
        state = self.model.state_dict()
        whole = whole_tree({name: state[name] for name in _trained(self.model)}, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.cut:
            return super()._save_optimizer_and_scheduler(output_dir)
        whole = whole_tree(self.optimizer.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(whole, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        with resuming(checkpoint):
            self._resume_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _resume_optimizer_and_scheduler(self, checkpoint: str) -> None:
        if not self.cut:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(optimizer_part(state, parameters))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """What is trained, and buffers: a frozen 7B backbone is not written at every checkpoint."""
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        kept = {name: state[name].contiguous() for name in _trained(self.model) if name in state}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer, whose older checkpoints go only once the new one stands. A disk that is full is not kept full."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            if self.args.should_save and not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                error.add_note(f"while writing {folder}; what was saved before it is whole")
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with resuming(resume_from_checkpoint):
            state = read_tensors(Path(resume_from_checkpoint) / WEIGHTS)
        target = self.model if model is None else model
        missing = [name for name in _trained(target) if name not in state]
        current = target.state_dict()
        state = {name: part_of(value, current[name]) if name in current else value for name, value in state.items()}
        unexpected = target.load_state_dict(state, strict=False).unexpected_keys
        if missing or unexpected:
            raise CheckpointError(
                f"{resume_from_checkpoint} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}"
                "; resume with the settings it was started with"
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation set, each named eval_*; those that cannot be known (no pairs) are left out."""
        found = self.measure(self.get_eval_dataloader(eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items() if value is not None}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, batches: Any) -> dict[str, float | None]:
        raise NotImplementedError


def shard_for_launch(model: Any, args: TrainingArguments) -> bool:
    """Cut a model with a `backbone`, and perhaps `heads`, as `accelerate launch` asks; whether it does."""
    sharding = sharding_of_launch()
    if sharding is None:
        return False
    if args.bf16:
        sharding = replace(sharding, param_dtype=torch.bfloat16)
    sharding.shard(model, model.backbone, *getattr(model, "heads", {}).values())
    model.use_one_forward()
    return True


def _trained(model: nn.Module) -> list[str]:
    """Names of trained parameters (tied ones once) and of buffers that a state dict holds."""
    buffers = set(dict(model.named_buffers())) & set(model.state_dict())
    return [name for name, p in model.named_parameters() if p.requires_grad] + sorted(buffers)


class ResponseLogps(nn.Module):
    """(B, R) log-probabilities of the responses, as one module, so that DDP and FSDP see its forward.

    one_forward: as of `HeadedModel`.
    """

    one_forward = False

    def __init__(self, backbone: Any, suppress: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.suppress = backbone, suppress

    def use_one_forward(self) -> None:
        """From now on: for a model that was cut over ranks."""
        self.one_forward = True

    def forward(self, prompts: Inputs, responses: Responses) -> Tensor:
        states = response_states(self.backbone, prompts, responses, one_forward=self.one_forward)  # (B, R + 1, H)
        return token_logps(
            states[:, :-1], output_head(self.backbone), responses.ids, suppress=self.suppress, mask=responses.mask
        )


class SFTTrainer(SupervisedTrainer):
    """Cross-entropy on response tokens only; a placeholder's probability is not trained, as it is never sampled."""

    def __init__(self, model: ResponseLogps, args: TrainingArguments, **kwargs: Any) -> None:
        self.backbone = model.backbone
        super().__init__(model, args, **kwargs)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        logps = model(self.features(batch["prompts"]), batch["responses"])
        return token_cross_entropy(logps, batch["responses"].mask), {}

    @torch.no_grad()
    def measure(self, batches: Any) -> dict[str, float | None]:
        self.model.eval()
        rows: list[Tensor] = []
        for batch in map(self._prepare_inputs, batches):
            mask = batch["responses"].mask
            logps = self.model(self.features(batch["prompts"]), batch["responses"])
            mean = -(logps.masked_fill(~mask, 0.0).sum(1) / mask.sum(1))  # (B,)
            rows.append(self.accelerator.gather_for_metrics(mean))
        loss = torch.cat(rows).double().mean().item()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class PreferenceTrainer(SupervisedTrainer):
    """A reward or cost model: one score a response, both responses of a pair in one forward of 2B rows.

    algorithm: `RewardModel` or `CostModel`. scored: scores (N, 2) and labels of what was measured last.
    """

    def __init__(self, model: HeadedModel, args: TrainingArguments, *, algorithm: Any, kind: str, **more: Any) -> None:
        self.backbone, self.algorithm = model.backbone, algorithm
        self.metrics: Callable[..., dict[str, float | None]] = {"reward": reward_metrics, "cost": cost_metrics}[kind]
        super().__init__(model, args, **more)

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(B, 2) in data-set order."""
        pairs = batch["pairs"]
        prompts = self.features(pairs.prompts).repeat(2)
        return model(prompts, interleaved(pairs.responses))["score"].view(-1, 2)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = self.algorithm.loss(self.scores(model, batch), batch["pairs"])
        return loss, metrics

    def score_all(self, batches: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (N, 2) and labels of every pair, of all ranks, on the CPU."""
        self.model.eval()
        columns: dict[str, list[Tensor]] = defaultdict(list)
        for batch in map(self._prepare_inputs, batches):
            pairs = batch["pairs"]
            with torch.no_grad(), self.compute_loss_context_manager():
                row = {"scores": self.scores(self.model, batch)}
            row |= {"more_helpful": pairs.more_helpful, "safer": pairs.safer}
            row |= {name: batch[name] for name in ("unsafe", "tied_helpfulness", "tied_safety")}
            for name, value in self.accelerator.gather_for_metrics(row).items():
                columns[name].append(value.cpu())
        joined = {name: torch.cat(values) for name, values in columns.items()}
        return joined.pop("scores"), joined

    def measure(self, batches: Any) -> dict[str, float | None]:
        self.scored = self.score_all(batches)
        return self.metrics(*self.scored)
