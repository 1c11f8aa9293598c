"""Predicted peak memory of each stage of a run on one device, from the settings and the model's config alone.

What stands all the time (weights by role, optimizer states) plus the largest of what comes and goes (generation,
scoring, the update). Lengths are the longest that the settings let through, so a run stays below. Not in it: the
pixels of a rollout, what the vision tower needs for a moment, and what the device takes for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from safe_rlhf_v.config import ModelSection, PolicySection, SettingsError, TrainSection
from safe_rlhf_v.planning.footprint import Sizes, Step, sizes, step_peak
from safe_rlhf_v.stages.stages import STAGES
from safe_rlhf_v.vlm.adapters import LoraSettings
from safe_rlhf_v.vlm.backbone import to_dtype

FLOAT = 4  # bytes of float32: adapters, their gradients, AdamW's two moments
SUPERVISED = tuple(name for name, stage in STAGES.items() if stage.memory is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of a stage. held: by role, all the time; passing: by phase, one at a time."""

    stage: str
    held: Mapping[str, int]
    passing: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(self.passing.values(), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """What a stage works on. source: a folder or hub id with a config; lora: adapters, where a stage has them; prompt:
    tokens of the longest prompt, image tokens included; response: of the longest in the data.
    """

    source: str | Path
    dtype: str
    quantization: str | None
    lora: LoraSettings
    prompt: int
    response: int


def planned_model(model: ModelSection, source: str | Path, prompt: int | None = None) -> PlannedModel:
    """With the limits of the settings. Raises SettingsError where there is none and none is given."""
    longest = prompt or model.max_prompt_length
    if longest is None or model.max_response_length is None:
        raise SettingsError(
            "model.max_prompt_length or model.max_response_length is null, so the longest row is unknown: set them, or "
            "give --prompt-tokens"
        )
    return PlannedModel(
        source=source,
        dtype=model.dtype,
        quantization=model.quantization,
        lora=LoraSettings(r=model.lora.r, alpha=model.lora.alpha, dropout=0.0),
        prompt=longest,
        response=model.max_response_length,
    )


def supervised(stage: str, section: TrainSection, model: PlannedModel) -> StageMemory:
    """A supervised stage, under DDP: every device holds all of it."""
    forward = STAGES[stage].memory
    assert forward is not None, "a supervised stage"
    lora = model.lora if section.use_lora else None
    if not section.freeze_vision:
        raise SettingsError(f"{stage}.freeze_vision: false is not predicted: the tower's own activations are unknown")
    size = sizes(model.source, model.dtype, model.quantization, lora)
    batch = section.per_device_train_batch_size
    shared = batch if forward.pairs and size.reads_once else None
    rows = batch * (2 if forward.pairs else 1)
    checkpointing = section.gradient_checkpointing in (True, "language")
    step = Step(
        rows=rows, length=model.prompt + model.response, response=model.response, prompts=shared, lora=lora,
        autocast=section.bf16,
        loss=forward.loss, checkpointing=checkpointing,
    )  # fmt: skip
    number = size.adapter if lora else size.trainable
    if forward.loss == "score" and not lora:
        number -= 0 if size.tied else size.width * size.vocabulary  # its output layer is frozen
    each = FLOAT if lora else to_dtype(model.dtype).itemsize
    held = {"backbone": size.weights, "adapter": size.adapter * FLOAT if lora else 0}
    held |= {"start, reward and cost model": 3 * size.weights} if forward.scorers else {}  # while it samples
    held |= {"optimizer": _moments(section.optim, number, each)}
    return StageMemory(stage=stage, held=_some(held), passing={"step": step_peak(model.source, model.dtype, step)})


def policy(section: PolicySection, model: PlannedModel, devices: int = 1, *, critics: bool) -> StageMemory:
    """The policy stage. devices: those over which FSDP2 shards policy.roles: separate; else every device holds all.

    critics: whether the algorithm has them.
    """
    trained = ["policy", *(["reward_critic", "cost_critic"] if critics else [])]
    if section.roles == "separate":
        return _separate(section, model, trained, devices)
    lora = model.lora
    size = sizes(model.source, model.dtype, model.quantization, lora)
    held = {"backbone and reference": size.weights}
    held |= {f"{role} adapter": size.adapter * FLOAT for role in [*trained, "reward", "cost"]}
    held |= {f"{role} optimizer": _moments(section.optim, size.adapter, FLOAT) for role in trained}
    step: dict[str, Any] = dict(lora=lora, checkpointing=section.gradient_checkpointing, autocast=section.bf16)
    temporary = 2 * size.adapter * FLOAT  # gradients, and AdamW's square roots
    passing = _online(section, model, size, step) | {"optimizer step": temporary}
    return StageMemory(stage="policy", held=held, passing=passing)


def _separate(section: PolicySection, model: PlannedModel, trained: list[str], devices: int) -> StageMemory:
    cut = devices > 1
    dtype = "bfloat16" if cut else model.dtype
    size, computed = sizes(model.source, model.dtype), sizes(model.source, dtype)
    part = ceil(size.language / devices)
    held = {"vision tower, shared": computed.vision if cut else size.vision}
    held |= dict.fromkeys(["policy", "reference", "reward", "cost", *trained[1:]], part)
    moments = _moments(section.optim, part // to_dtype(model.dtype).itemsize, to_dtype(model.dtype).itemsize)
    held |= {f"{role} optimizer": moments for role in trained}
    step: dict[str, Any] = dict(checkpointing=section.gradient_checkpointing, keep_grads=not cut)
    step["autocast"] = section.bf16 and not cut
    passing = _online(section, replace(model, dtype=dtype), computed, step, cut)
    if cut:  # whole for a moment: this layer and the next, embedding and output layer, and their gradients
        whole = 2 * computed.largest_layer + computed.outside_layers
        passing = {name: n + (whole if name == "update" else computed.language) for name, n in passing.items()}
        passing["update"] += part + computed.largest_layer + computed.outside_layers
    return StageMemory(stage="policy", held=held, passing=passing | {"optimizer step": 2 * part})


def _online(
    section: PolicySection, model: PlannedModel, size: Sizes, step: dict[str, Any], cut: bool = False
) -> dict[str, int]:
    """What comes and goes in a rollout and its update. step: options of an update's pass."""
    prompts, said = section.per_device_train_batch_size, section.max_new_tokens
    rows, total, budget = prompts * section.num_generations, model.prompt + said, section.per_device_micro_batch_tokens

    def peak(count: int, response: int, most: int, **options: Any) -> int:
        """Of the largest pass on `count` rows, which read at most so many prompts, or each row its own."""
        length = model.prompt + response
        fit = max(1, budget // length) if budget else count
        n = min(count, section.per_device_micro_batch_size or count, fit)
        read = most if size.reads_once and most < n else None
        step = Step(rows=n, length=length, response=response, prompts=read, loss="logps", **options)
        return step_peak(model.source, model.dtype, step)

    batch, samples = section.mini_batch_size, section.num_generations
    together = min(prompts, ceil(batch / samples) + bool(batch % samples))  # samples of a prompt stay together
    # of the three networks the policy takes most: it alone has logits
    updates = [peak(batch, said, batch if cut else together, **step)]
    updates += [peak(batch, model.response, batch, **step)] if section.ptx_coeff else []
    prefill = Step(rows=rows, length=model.prompt, response=1, loss="score", grad=False)
    cache = size.cache_a_token * rows * total
    features = size.width * model.prompt * to_dtype(model.dtype).itemsize * section.per_device_train_batch_size
    scores = 4 * FLOAT * rows * size.vocabulary  # float32 logits, with what sampling makes of them
    found = {
        "generation": cache + max(step_peak(model.source, model.dtype, prefill), scores + cache // 8),
        "scoring": peak(rows, said, prompts, grad=False),
        "update": max(updates),
    }
    return {name: bytes_ + features for name, bytes_ in found.items()}


def _moments(optimizer: str, number: int, each: int) -> int:
    """AdamW's two moments, of the weights' type; gradients come with the step. Raises for optimizers not known.

    Paged ones may move to the host; here they count as if they stayed.
    """
    if optimizer in ("adamw_torch", "adamw_torch_fused"):
        return 2 * number * each
    if optimizer == "paged_adamw_32bit":
        return 2 * number * FLOAT
    if optimizer in ("adamw_bnb_8bit", "paged_adamw_8bit", "adamw_8bit"):
        return 2 * number
    raise SettingsError(f"optim {optimizer!r} is not predicted: use adamw_torch_fused, adamw_torch or adamw_bnb_8bit")


def _some(held: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in held.items() if number}
