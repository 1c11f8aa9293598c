"""Settings of the model, the data and the supervised stages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from safe_rlhf_v.algorithms.cost_model import CostModel
from safe_rlhf_v.algorithms.reward_model import RewardModel
from safe_rlhf_v.arguments import GuardOptions, LoraSettings, Schedule
from safe_rlhf_v.config.sections import Declared, Location, Section, section_of
from safe_rlhf_v.fields import Count, NonNegative, Positive, Rate


class LoraSection(section_of(LoraSettings, without=("targets",))):  # type: ignore[misc]
    """Low-rank adapters on every linear layer of the language model."""


class ModelSection(Section):
    path: Location = Field("", description="Folder or hub id of a vision-language model in transformers' format.")
    start: Location | None = Field(None, description="Model that reward, cost, guard and policy start from; null takes <output_dir>/sft where that is finished, else path.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the frozen weights. Weights that are trained whole want float32 (and bf16: true); adapters stay float32."
    )
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="bitsandbytes quantization of the frozen backbone; needs adapters.")
    attn_implementation: str | None = Field(None, description="Attention kernel as in transformers: sdpa, eager, flash_attention_2; null takes its choice.")
    max_prompt_length: Positive | None = Field(None, description="Prompts with more tokens (image tokens included) are dropped and counted, never cut; null keeps all.")
    max_response_length: Positive | None = Field(512, description="Responses with more tokens are dropped and counted, never cut; null keeps all.")
    lora: LoraSection = Field(LoraSection(), description="Adapters, where a stage has use_lora: true.")


class DataSection(Section):
    path: Location = Field("", description="Folder in the BeaverTails-V layout (data/<category>/<split>.parquet), a .parquet or .jsonl file, or a hub id.")
    train_split: str = Field("train", description="Split that is trained on.")
    evaluation_split: str = Field("evaluation", description="Split that is measured on; never trained on.")
    categories: list[str] | None = Field(None, description="Only these categories; null takes all.")
    revision: str | None = Field(None, description="Revision of a hub data set; pin it for a repeatable run.")
    keep: list[Literal["contradictory", "identical", "empty"]] = Field(
        default_factory=list, description="Kinds of faulty rows to keep; all others are dropped and reported."
    )
    columns: Location | None = Field(None, description="Column map for data with other column names: the name of a shipped one or the path of a .yaml file (docs/data.md); null recognises the data by its columns.")
    check_images: Literal["all", "header", "none"] = Field("all", description="all: decode every picture when loading; header: look at size and format, and read each in full before the first step; none: open no picture before it is used, for data that were checked already.")
    limit: Positive | None = Field(None, description="At most this many training rows: a sample spread over all files, the same in every run and for every seed; null takes all.")
    evaluation_limit: Positive | None = Field(None, description="At most this many evaluation rows, sampled like limit; null takes all.")

    @property
    def allow_contradictory(self) -> bool:
        """Whether pairs are learned from whose safer response has the lower harmless rate."""
        return "contradictory" in self.keep


class TrainSection(Section):
    """Arguments shared by the supervised stages; names and meaning as in transformers.TrainingArguments."""

    learning_rate: Rate = Field(3e-5, description="Peak learning rate. [code] 3e-5")
    num_train_epochs: Rate = Field(3.0, description="Passes over the training data. [code] 3")
    max_steps: int = Field(-1, ge=-1, description="Stop after this many optimizer steps; -1 goes by num_train_epochs.")
    per_device_train_batch_size: Positive = Field(4, description="Rows (pairs, for preference models) a device a forward pass. [code] 4")
    per_device_eval_batch_size: Positive = Field(8, description="Rows a device when measuring.")
    gradient_accumulation_steps: Positive = Field(1, description="Forward passes an optimizer step.")
    lr_scheduler_type: Schedule = Field("cosine", description="Schedule as in transformers: constant_with_warmup, cosine, linear, ...")
    warmup_steps: NonNegative = Field(0.03, description="Warm-up: steps, or below 1 a share of all steps.")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: NonNegative = Field(1.0, description="Gradients are scaled down to this norm; 0 leaves them.")
    optim: str = Field("adamw_torch_fused", description="Optimizer as in transformers, for example adamw_torch or adamw_bnb_8bit.")
    bf16: bool = Field(False, description="Compute in bfloat16 over float32 weights.")
    gradient_checkpointing: bool | Literal["language", "vision"] = Field(False, description="Recompute activations in the backward pass: less memory, a third slower. language, vision: only there.")
    freeze_vision: bool = Field(True, description="Do not train the vision tower; each picture is then encoded once a step. [code] true")
    use_lora: bool = Field(True, description="Train adapters (model.lora) and heads; false trains all weights.")
    save_steps: Positive = Field(200, description="Write a checkpoint every so many steps.")
    save_total_limit: Positive = Field(1, description="Checkpoints kept.")
    logging_steps: Positive = Field(10, description="Write metrics.jsonl every so many steps.")
    eval_steps: Count = Field(0, description="Measure on the evaluation split every so many steps; 0 only at the end.")
    report_to: list[str] = Field(default_factory=list, description="Trackers as in transformers, for example [tensorboard].")

    @model_validator(mode="after")
    def _adapters_freeze_the_rest(self) -> TrainSection:
        if self.use_lora and not self.freeze_vision:
            raise ValueError("freeze_vision: false needs use_lora: false; with adapters all else is frozen")
        if self.gradient_checkpointing == "vision" and self.freeze_vision:
            raise ValueError("gradient_checkpointing: vision saves nothing: a frozen vision tower keeps no activations")
        return self


class SFTSection(TrainSection):
    learning_rate: Rate = Field(2e-5, description="Peak learning rate. [ours]")
    use_lora: bool = Field(False, description="Train adapters (model.lora), merged into the saved model; false trains all weights.")
    responses: Literal["all", "more_helpful", "safer"] = Field("more_helpful", description="Which responses of a pair are imitated.")


class StageSection(TrainSection, Declared):
    """Settings of every stage, and the fields of a class of its own."""


class RewardSection(section_of(RewardModel, base=StageSection)):  # type: ignore[misc]
    lr_scheduler_type: Schedule = Field("constant_with_warmup", description="Schedule as in transformers. [code] constant_with_warmup")


class CostSection(section_of(CostModel, base=StageSection, without=("allow_contradictory",))):  # type: ignore[misc]
    graded: bool = Field(True, description="Weigh the sign term by the harmless rate in -3..3 (Safe RLHF-V); false uses +1 / -1 (Safe RLHF).")


class GuardSection(section_of(GuardOptions, base=StageSection, without=("picture_cache",))):  # type: ignore[misc]
    """A classifier of queries and responses: safe or not, category, four levels of severity."""

    benign: Location | None = Field(None, description="Data whose prompts are harmless, where data.path has only harmful ones (as BeaverTails-V); without it queries are not learned.")
    path: Location | None = Field(None, description="Folder of a trained guard to use; null takes <output_dir>/guard.")
    policy: Location | None = Field(None, description="YAML file of what the guard does at which severity; null takes the one saved with it.")
    max_rounds: Count = Field(5, description="Rounds of filter and regenerate before the guard gives up. [paper] 5")
