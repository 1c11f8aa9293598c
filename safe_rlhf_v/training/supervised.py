"""Supervised fine-tuning and the reward and cost models of Safe RLHF-V (arXiv 2503.17682), from data to a saved folder.

Each function trains, measures on the evaluation rows and writes to `output_dir`: the model with its processor,
metrics.jsonl, metrics.json and left_out.jsonl. Run again, it resumes from the newest whole checkpoint, bit for bit on
the same hardware.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from beavertails_v.schema import Comparison, LabelledResponse
from safe_rlhf_v.config import CostSection, ModelSection, RewardSection, SettingsError, SFTSection, TrainSection
from safe_rlhf_v.distributed.fsdp2 import launched_sharded, launched_under
from safe_rlhf_v.files import replace_text
from safe_rlhf_v.processes import process_state
from safe_rlhf_v.training.checkpoint import latest_checkpoint
from safe_rlhf_v.training.encode import (
    LeftOut,
    PairCollator,
    ResponseCollator,
    dropped,
    list_left_out,
    pair_rows,
    response_rows,
    thorough,
)
from safe_rlhf_v.training.records import MetricsFile, ProgressBar
from safe_rlhf_v.training.setup import Setup
from safe_rlhf_v.training.trainers import PreferenceTrainer, ResponseLogps, SFTTrainer, SupervisedTrainer
from safe_rlhf_v.vlm.adapters import whole_name
from safe_rlhf_v.vlm.backbone import LoraSettings, add_lora, freeze_vision, load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel, save_adapter
from safe_rlhf_v.vlm.memory import checkpoint_gradients
from safe_rlhf_v.vlm.processing import Encoder, load_processor

SAMPLE = 500  # training pairs that a cost model scores at the end, for the cost threshold "auto"
Resume = str | bool | None
Split = tuple[Sequence[Any], Any]  # a data set, and the Rows or DirectRows of it that are used


def train_sft(
    train: Sequence[Comparison] | Sequence[LabelledResponse],
    evaluation: Sequence[Comparison] | Sequence[LabelledResponse],
    base: str | Path,
    output_dir: str | Path,
    section: SFTSection,
    setup: Setup,
    resume_from_checkpoint: Resume = "auto",
) -> dict[str, Any]:
    """Fine-tune `base` on the responses that section.responses picks; returns what metrics.json holds.

    Adapters are merged: the folder always holds a whole model. resume_from_checkpoint: "auto", a folder, or None.
    Raises DataError where no row can be encoded, SettingsError where the settings cannot go together.
    """
    output_dir = Path(output_dir)
    backbone, encoder = load_for_training(base, setup, section)
    if section.use_lora:
        add_lora(backbone, lora_settings(setup.model))
    rows = response_rows(train, section.responses, encoder)
    held_out = response_rows(evaluation, section.responses, thorough(encoder))
    list_missing(output_dir, (train, rows), (evaluation, held_out))
    trainer = SFTTrainer(
        ResponseLogps(backbone, encoder.placeholder_ids),
        training_arguments(section, output_dir, setup.seed),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=ResponseCollator(encoder),
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    measured = fit(trainer, "sft", resume_from_checkpoint)
    trainer.make_whole()
    if trainer.is_world_process_zero():
        save_policy(backbone, encoder, output_dir, setup.model.dtype, base if section.use_lora else None)
    return finish(trainer, (train, rows), (evaluation, held_out), measured)


def train_preference_model(
    kind: Literal["reward", "cost"],
    train: Sequence[Comparison],
    evaluation: Sequence[Comparison],
    base: str | Path,
    output_dir: str | Path,
    section: RewardSection | CostSection,
    setup: Setup,
    resume_from_checkpoint: Resume = "auto",
) -> dict[str, Any]:
    """Train a reward model (which response is more helpful) or a cost model (which is safer, and is it safe).

    Returns what metrics.json holds; a cost model's train_sample holds the same metrics on at most 500 training pairs,
    among them mean_cost_safe, from which a cost threshold can be taken, and train_scores.jsonl the scores themselves.
    Raises as `train_sft`.
    """
    output_dir = Path(output_dir)
    backbone, encoder = load_for_training(base, setup, section)
    freeze_output_layer(backbone)
    model = HeadedModel(backbone, {"score": 1}, lora_settings(setup.model) if section.use_lora else None)
    model.kind = kind
    rows, held_out = pair_rows(train, encoder), pair_rows(evaluation, thorough(encoder))
    list_missing(output_dir, (train, rows), (evaluation, held_out))
    trainer = PreferenceTrainer(
        model,
        training_arguments(section, output_dir, setup.seed),
        kind=kind,
        algorithm=section.made(allow_contradictory=setup.data.allow_contradictory),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=PairCollator(encoder, graded=not isinstance(section, CostSection) or section.graded),
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    measured = fit(trainer, kind, resume_from_checkpoint)
    if trainer.is_world_process_zero():
        _write_scores(output_dir / "evaluation_scores.jsonl", held_out, *trainer.scored)
    if kind == "cost":
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(setup.seed))[:SAMPLE].tolist()
        sample = Subset(rows, chosen)
        measured["train_sample"] = trainer.measure(trainer.get_eval_dataloader(sample))
        if trainer.is_world_process_zero():
            _write_scores(output_dir / "train_scores.jsonl", sample, *trainer.scored)
    trainer.make_whole()
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir, encoder.processor)
    return finish(trainer, (train, rows), (evaluation, held_out), measured)


def missing(split: Split) -> list[LeftOut]:
    """What loading left out of a split and what cannot be encoded, by file, row and split."""
    return dropped(split[0]) + split[1].left_out


def list_missing(folder: Path, *splits: Split) -> None:
    """left_out.jsonl, before anything can end the run; and a line of what cannot be encoded."""
    unread = [f"{len(rows.left_out)} of {len(data)} rows" for data, rows in splits if rows.left_out]
    list_left_out(folder, [x for split in splits for x in missing(split)], unread)


def load_for_training(base: str | Path, setup: Setup, section: TrainSection) -> tuple[Any, Encoder]:
    """Backbone with what does not train frozen, and its encoder. Seeds first: heads and adapters follow."""
    model = setup.model
    if model.quantization and not section.use_lora:
        raise SettingsError(f"model.quantization = {model.quantization!r} needs use_lora: true: only adapters train")
    backbone = prepared_backbone(base, setup, section)
    return backbone, limited_encoder(load_processor(base), setup, backbone.config)


def limited_encoder(processor: Any, setup: Setup, config: Any) -> Encoder:
    """The gate of training rows: what is too long for the settings is refused, and pictures are opened as they say."""
    limits = setup.model
    return Encoder(
        processor,
        limits.max_prompt_length,
        max_response_length=limits.max_response_length,
        opens_pictures=setup.opens_pictures,
        config=config,
    )


def prepared_backbone(base: str | Path, setup: Setup, section: TrainSection) -> Any:
    """The base model as a stage trains it, seed set first: vision frozen or not, as the section says.

    Raises SettingsError where it should be cut over the ranks and cannot be.
    """
    model = setup.model
    if launched_sharded():
        _refuse_under_sharding(model, section)
    set_seed(setup.seed)
    backbone = load_backbone(
        base, dtype=model.dtype, quantization=model.quantization, attn_implementation=model.attn_implementation
    )
    if section.freeze_vision:
        freeze_vision(backbone)
    checkpoint_gradients(backbone, section.gradient_checkpointing)
    return backbone


def _refuse_under_sharding(model: ModelSection, section: TrainSection) -> None:
    stage = _stage(section)
    if launched_under("DEEPSPEED"):
        raise SettingsError(f"{stage} is cut by FSDP2, not DeepSpeed: use configs/accelerate/fsdp2.yaml")
    if model.quantization:
        raise SettingsError("model.quantization: FSDP2 does not cut quantized weights: set it to null, or use DDP")
    if not section.freeze_vision:
        raise SettingsError(f"{stage}.freeze_vision: false is not supported under FSDP2: set it to true, or use DDP")
    if section.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"{stage}.optim {section.optim!r} does not know cut weights: use adamw_torch under FSDP2")


def _stage(section: TrainSection) -> str:
    return type(section).__name__.removesuffix("Section").lower()


def freeze_output_layer(backbone: Any) -> None:
    """A scoring model forms no logits; DDP waits for ever for the gradients of weights that no loss reaches."""
    output, embedding = backbone.get_output_embeddings(), backbone.get_input_embeddings()
    if output.weight is not embedding.weight:
        output.requires_grad_(False)


def lora_settings(model: ModelSection, dropout: float | None = None) -> LoraSettings:
    """The adapters of model.lora, or with another dropout: none where log-probabilities must not vary."""
    made: LoraSettings = model.lora.made()
    return made if dropout is None else replace(made, dropout=dropout)


def training_arguments(section: TrainSection, output_dir: str | Path, seed: int, **more: Any) -> TrainingArguments:
    """transformers' arguments of a stage: those of the section, and what our batches need."""
    # gradient_checkpointing is set on the backbone: the module that Trainer sees is not a PreTrainedModel.
    ours = {"freeze_vision", "use_lora", "report_to", "eval_steps", "gradient_checkpointing"}
    shared = section.model_dump(include=set(TrainSection.model_fields) - ours)
    known = [optimizer.value for optimizer in OptimizerNames]
    if section.optim not in known:
        raise SettingsError(f"{_stage(section)}.optim = {section.optim!r}: should be one of {', '.join(known)}")
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        report_to=section.report_to or "none",
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps or None,
        remove_unused_columns=False,
        label_names=[],
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=not section.freeze_vision,
        dataloader_pin_memory=False,
        use_cpu=process_state().device.type == "cpu",  # or it refuses bf16 there
        **shared,
        **more,
    )


def run(trainer: SupervisedTrainer, name: str, resume: Resume) -> None:
    """Train to the end, from the newest whole checkpoint where resume is "auto"; with our bar in place of Trainer's."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar(name))
    newest = latest_checkpoint(str(trainer.args.output_dir)) if resume == "auto" else None
    trainer.train(resume_from_checkpoint=str(newest) if newest else None if resume == "auto" else resume)


def fit(trainer: SupervisedTrainer, name: str, resume: Resume) -> dict[str, Any]:
    """Train and measure; a loss that does not fall is said."""
    run(trainer, name, resume)
    evaluation = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items() if name != "epoch"}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero() and (warning := flat_loss(name, losses)):
        print(warning, flush=True)
    return {"steps": trainer.state.global_step, "train_loss": losses[-1] if losses else None, "evaluation": evaluation}


def flat_loss(name: str, losses: Sequence[float]) -> str | None:
    """A warning where the last quarter of the logged losses is no lower than the first; None below eight of them."""
    part = len(losses) // 4
    if part < 2:
        return None
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if last < first:
        return None
    return (
        f"warning: {name}: the loss did not fall ({first:.3g} at first, {last:.3g} at last): look at "
        f"{name}.learning_rate (adapters want about 1e-4, full weights a tenth of that), or train for longer"
    )


def save_policy(backbone: Any, encoder: Encoder, output_dir: Path, dtype: str, adapter_base: str | Path | None) -> None:
    """A whole model: adapters are merged into full-precision weights, also where training ran on quantized ones.

    adapter_base: the model that the adapter was trained on, itself perhaps an adapter folder; None without adapters.
    """
    if adapter_base is not None:
        # not backbone.name_or_path: of an adapter folder that is the model below it, and its adapter would be lost
        backbone.peft_config["default"].base_model_name_or_path = whole_name(adapter_base)
        save_adapter(backbone, "default", output_dir / "adapter")
        backbone = load_backbone(output_dir / "adapter", dtype=dtype)
    backbone.save_pretrained(output_dir)
    encoder.processor.save_pretrained(output_dir)


def _write_scores(path: Path, pairs: Any, scores: Tensor, labels: Mapping[str, Tensor]) -> None:
    """One line a pair, in data-set order: prompt_id, scores, more_helpful, safer, unsafe, tied_helpfulness,
    tied_safety."""
    prompts = [pairs[i].prompt.id for i in range(len(pairs))]
    columns = {"prompt_id": prompts, "scores": scores.tolist(), **{name: x.tolist() for name, x in labels.items()}}
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows), encoding="utf-8")


def finish(trainer: SupervisedTrainer, train: Split, evaluation: Split, measured: dict[str, Any]) -> dict[str, Any]:
    """Write, last and whole, metrics.json: it says that all is there. On the main process alone."""
    measured |= {"train_rows": len(train[1]), "evaluation_rows": len(evaluation[1])}
    measured |= {"left_out": len(missing(train)), "evaluation_left_out": len(missing(evaluation))}
    return write_measured(trainer, measured)


def write_measured(trainer: SupervisedTrainer, measured: dict[str, Any]) -> dict[str, Any]:
    """metrics.json, whole or not at all, by the main process while the others wait."""
    if trainer.is_world_process_zero():
        replace_text(Path(str(trainer.args.output_dir)) / "metrics.json", json.dumps(measured, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    return measured
