"""All settings of a run: one YAML file, one section a stage. Unknown keys are errors; `load_settings` reads them.

Argument names are those of transformers and TRL. Defaults are the papers' where a paper gives them: Safe RLHF-V
(arXiv 2503.17682) and its released code, Safe RLHF (arXiv 2310.12773).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from safe_rlhf_v.config_io import SettingsError, dump_yaml, load, walk
from safe_rlhf_v.files import replace_text

__all__ = ["Settings", "SettingsError", "load_settings", "walk"]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
# Those of transformers that need nothing but a number of steps.
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]  # fmt: skip
# AdamW as transformers names it, of torch and of bitsandbytes.
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _at_home(path: str) -> str:
    """`~/x` as a shell means it: nobody wants a folder called ~."""
    found = os.path.expanduser(path)
    if found == path and path.startswith("~"):
        raise ValueError("there is no user of that name; write ./~... for a folder whose name begins so")
    if "\0" in path:
        raise ValueError("a path holds no NUL character")
    return found


# A folder or file, or a hub id.
Location = Annotated[str, AfterValidator(_at_home)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise ValueError("true / false is not a value here")
        return value


class LoraSection(Section):
    """Low-rank adapters on every linear layer of the language model."""

    r: Positive = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Scale of the adapters; the update is multiplied by alpha / r.")
    dropout: Share = Field(0.0, description="Dropout on the adapters' input in supervised stages; the policy trains without, or its old and new log-probabilities would differ by chance.")


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


class RewardSection(TrainSection):
    lr_scheduler_type: Schedule = Field("constant_with_warmup", description="Schedule as in transformers. [code] constant_with_warmup")
    regularization: NonNegative = Field(0.001, description="Weight of the mean squared score. [code] 0.001")


class CostSection(TrainSection):
    regularization: NonNegative = Field(0.001, description="Weight of the mean squared score. [code] 0.001")
    sign_weight: NonNegative = Field(1.0, description="Weight of the term that ties the sign of the cost to safe / unsafe. [code] 1")
    graded: bool = Field(True, description="Weigh the sign term by the harmless rate in -3..3 (Safe RLHF-V); false uses +1 / -1 (Safe RLHF).")


class PPOLagSection(Section):
    clip: Rate = Field(0.2, description="Clip range of the policy ratio. [code] 0.2")
    value_clip: Rate = Field(5.0, description="Clip range of the value update. [code] 5")
    gamma: Share = Field(1.0, description="Discount. [code] 1")
    lam: Share = Field(0.95, description="GAE lambda. [code] 0.95")
    token_clamp: Rate = Field(50.0, description="Bound of a token's reward and cost. [code] 50")
    window: Count = Field(128, description="The multiplier sees the mean cost of so many newest samples; 0: of the last rollout. [code] 128")
    delay: Count = Field(1, description="Rollouts before the multiplier first moves. [code] 1")


class GroupLagSection(Section):
    clip: Rate = Field(0.2, description="Clip range of the policy ratio.")
    scale: bool = Field(True, description="Divide by the group's standard deviation (GRPO); false only centres (RLOO).")
    window: Count = Field(128, description="The multiplier sees the mean cost of so many newest samples; 0: of the last rollout.")
    delay: Count = Field(1, description="Rollouts before the multiplier first moves.")


class RePOSection(PPOLagSection):
    form: Literal["rectified", "gated", "per_prompt"] = Field("rectified", description="rectified: {c + margin}+ as terminal cost; per_prompt: {mean cost of a prompt's samples + margin}+, needs num_generations of at least 2; gated: the cost enters unsafe samples only, which is no gradient of any penalty and can raise the share of unsafe answers.")
    margin: NonNegative = Field(0.0, description="m of {c + m}+: costs must lie at or under -m; at 0 the optimum lies on the cost model's boundary, among its misses. [ours]")
    slack: NonNegative = Field(0.0, description="Mean {c + margin}+ that is let pass; without it the multiplier never falls.")
    window: Count = Field(0, description="The multiplier sees the mean {c + margin}+ of so many newest samples; 0: of the last rollout.")
    delay: Count = Field(0, description="Rollouts before the multiplier first moves.")


class RLOOLagSection(Section):
    clip: Rate = Field(0.2, description="Clip range of the ratio of whole responses.")
    window: Count = Field(128, description="The multiplier sees the mean cost of so many newest samples; 0: of the last rollout.")
    delay: Count = Field(1, description="Rollouts before the multiplier first moves.")


class TwoCriticsSection(Section):
    """Without a multiplier: crpo and p3o."""

    clip: Rate = Field(0.2, description="Clip range of the policy ratio.")
    value_clip: Rate = Field(5.0, description="Clip range of the value update.")
    gamma: Share = Field(1.0, description="Discount.")
    lam: Share = Field(0.95, description="GAE lambda.")
    token_clamp: Rate = Field(50.0, description="Bound of a token's reward and cost.")
    window: Count = Field(0, description="The bound is checked on the mean cost of so many newest samples; 0: of the last rollout.")


class CRPOSection(TwoCriticsSection):
    tolerance: NonNegative = Field(0.0, description="Cost is lowered while its mean is above threshold + tolerance.")


class P3OSection(TwoCriticsSection):
    kappa: NonNegative = Field(20.0, description="Weight of the penalty; the bound is kept where it exceeds the multiplier that would keep it. [code] 20")


class ImitationSection(Section):
    window: Count = Field(0, description="The logged violation is of the mean cost of so many newest samples; 0: of the last rollout.")


class MeasureSection(Section):
    """Of what the threshold is a bound."""

    kind: Literal["mean", "high_confidence", "cvar"] = Field("mean", description="mean; high_confidence: mean + kappa standard deviations (HC-RLHF); cvar: mean of the worst 1 - alpha.")
    kappa: NonNegative = Field(0.1, description="Used by high_confidence: standard deviations above the mean; t / sqrt(n) for a test on n prompts. [ours]")
    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Used by cvar: 0.9 bounds the mean of the worst tenth. [ours]")


class PIDSection(Section):
    """arXiv 2007.03964."""

    kp: NonNegative = Field(0.1, description="Proportional gain. [code] 0.1")
    ki: NonNegative = Field(0.01, description="Integral gain. [code] 0.01")
    kd: NonNegative = Field(0.01, description="Derivative gain. [code] 0.01")
    delay: Positive = Field(10, description="Rollouts over which the derivative is taken. [code] 10")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Weight of the past in the running mean. [code] 0.95")
    initial: NonNegative = Field(0.001, description="First multiplier. [code] 0.001")
    maximum: Rate = Field(100.0, description="Largest multiplier. [code] 100")


class DualSection(Section):
    """The multiplier lambda >= 0 on the cost."""

    kind: Literal["log", "additive", "augmented", "pid", "fixed"] = Field("log", description="log: the released code's update (algorithm repo takes additive where none is named); additive: the paper's equation; augmented: augmented Lagrangian; pid: PID control; fixed: stays at initial (reward shaping; 0: reward alone).")
    lr: NonNegative = Field(0.1, description="Step size of log, additive and augmented. [code] 0.1")
    rho: NonNegative = Field(1.0, description="Used by augmented: weight of the present violation in the multiplier. [ours]")
    initial: NonNegative = Field(10.0, description="First multiplier of all but pid; the only one of fixed. Algorithm repo without slack, whose multiplier never falls, takes 0 where none is named. [code] 10")
    maximum: Rate = Field(20.0, description="Budget bound: largest multiplier of log, additive and augmented. [code] 20")
    pid: PIDSection = Field(PIDSection(), description="Used by kind: pid.")

    @model_validator(mode="after")
    def _bounds(self) -> DualSection:
        for name, rule in (("", self), ("pid.", self.pid)):
            if rule.initial > rule.maximum and (name or self.kind != "fixed"):
                raise ValueError(f"{name}initial {rule.initial:g} is above {name}maximum {rule.maximum:g}")
        if self.kind == "log" and self.initial == 0:
            raise ValueError("initial must be above 0 for kind log: the update multiplies it")
        return self


class EngineSection(Section):
    """What draws the responses of rollouts."""

    kind: Literal["transformers", "vllm"] = Field("transformers", description="transformers: on the training weights; vllm: vLLM, which is sent the adapter before every rollout and needs roles: adapters.")
    cache: Literal["dynamic", "static"] = Field("dynamic", description="Keys and values of transformers: dynamic grows; static has room for the longest answer, and lets a GPU compile the decoding step.")
    url: str | None = Field(None, description="Address of a vLLM server that reads the same folders, such as http://localhost:8000; null runs vLLM in this process.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="Share of the GPU's memory that vLLM in this process takes; training has the rest. [ours]")
    max_model_len: Positive | None = Field(None, description="Longest prompt and answer that vLLM in this process has room for; null takes the model's.")


class PolicySection(Section):
    """Reward is raised while the mean cost is kept at or under `threshold`."""

    algorithm: Literal["ppo_lag", "group_lag", "rloo_lag", "repo", "crpo", "p3o", "imitation"] = Field("ppo_lag", description="ppo_lag: Safe RLHF-V's, with two critics; group_lag (GRPO) and rloo_lag: no critics; repo: every prompt its own constraint; crpo and p3o: no multiplier; imitation: demonstrations alone, a control.")
    ppo_lag: PPOLagSection = Field(PPOLagSection(), description="Used by algorithm: ppo_lag.")
    group_lag: GroupLagSection = Field(GroupLagSection(), description="Used by algorithm: group_lag.")
    rloo_lag: RLOOLagSection = Field(RLOOLagSection(), description="Used by algorithm: rloo_lag.")
    repo: RePOSection = Field(RePOSection(), description="Used by algorithm: repo.")
    crpo: CRPOSection = Field(CRPOSection(), description="Used by algorithm: crpo.")
    p3o: P3OSection = Field(P3OSection(), description="Used by algorithm: p3o.")
    imitation: ImitationSection = Field(ImitationSection(), description="Used by algorithm: imitation.")
    measure: MeasureSection = Field(MeasureSection(), description="Of what the threshold is a bound.")
    dual: DualSection = Field(DualSection(), description="How the multiplier moves.")
    roles: Literal["adapters", "separate"] = Field("adapters", description="adapters: all six roles on one backbone; separate: full models.")
    reward_model: Location | None = Field(None, description="Folder of the reward model; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description="Folder of the cost model; null takes <output_dir>/cost.")
    threshold: float | Literal["auto"] = Field(-0.5, description="Bound d on the mean cost. auto: the mean cost of the training data's responses labelled safe. [code] -0.5")
    threshold_quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="With threshold auto: this quantile of those costs in place of their mean; the lower, the stricter. [ours]")
    beta: NonNegative = Field(0.02, description="Weight of the KL penalty to the start model. [code] 0.02")
    max_steps: Positive = Field(1000, description="Rollouts.")
    per_device_train_batch_size: Positive = Field(4, description="Prompts a rollout a device. [code] 4")
    num_generations: Positive = Field(1, description="Samples a prompt; group_lag and rloo_lag need at least 2.")
    num_ppo_epochs: Positive = Field(1, description="Passes over each rollout.")
    mini_batch_size: Positive = Field(4, description="Samples an optimizer step.")
    per_device_micro_batch_size: Positive | None = Field(None, description="Samples a forward pass, those of like length or of one prompt together, to save memory; the gradient is the same. null takes all. Halved when memory runs out.")
    per_device_micro_batch_tokens: Positive | None = Field(None, description="Tokens a forward pass, pads included; saves memory and, where lengths differ, time. null: no bound.")
    learning_rate: Rate = Field(5e-7, description="Learning rate of the policy. [code] 5e-7 for full weights; adapters want about 1e-5 [ours]")
    critic_learning_rate: Rate = Field(5e-7, description="Learning rate of both critics. [code] 5e-7")
    lr_scheduler_type: Schedule = Field("constant", description="Schedule as in transformers.")
    optim: Optimizer = Field("adamw_torch", description="AdamW as transformers names it. Those of bitsandbytes (the gpu extra) keep their moments in 8 bits, or (paged) where they may move to the host's memory.")
    warmup_steps: NonNegative = Field(0, description="Warm-up steps.")
    max_grad_norm: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay.")
    ptx_coeff: NonNegative = Field(16.0, description="Weight of the cross-entropy on demonstrations (the responses sft.responses picks) beside the policy loss. [code] 16")
    demonstrations: Literal["all", "more_helpful", "safer", "both"] | None = Field(None, description="Which responses of the training pairs the ptx term imitates; both: those preferred on both axes; null takes sft.responses.")
    max_new_tokens: Positive = Field(512, description="Longest sampled response. [code] 512")
    temperature: Rate = Field(1.0, description="Sampling temperature of rollouts. [code] 1")
    bf16: bool = Field(False, description="Compute in bfloat16 over float32 weights; for weights that are bfloat16 themselves, see model.dtype.")
    gradient_checkpointing: bool = Field(False, description="Recompute the language model's activations in the backward pass: less memory, a third slower. The frozen vision tower keeps none.")
    torch_compile: bool = Field(False, description="Compile the language model's layers with torch.compile; slow at first. Needs triton on a GPU, a C++ compiler on a CPU.")
    use_liger_kernel: bool = Field(False, description="Liger's fused kernels for norms, MLPs and rotary positions. Needs liger-kernel and a GPU.")
    vision_cache_mb: Count = Field(0, description="Megabytes of image features kept between rollouts; 0 encodes each rollout's pictures once.")
    engine: EngineSection = Field(EngineSection(), description="What draws the responses of rollouts.")
    guidance_rollouts: Count = Field(4, description="Rollouts of the start model whose costs are shown against the threshold before training.")
    multiplier_patience: Positive = Field(50, description="Rollouts the multiplier may stand at its maximum before a warning.")
    save_steps: Positive = Field(50, description="Write a checkpoint every so many rollouts; a killed run resumes from it bit for bit.")
    save_total_limit: Positive = Field(1, description="Checkpoints kept.")
    logging_steps: Positive = Field(1, description="Write metrics.jsonl every so many rollouts.")
    report_to: list[str] = Field(default_factory=list, description="Trackers, for example [tensorboard].")

    @model_validator(mode="after")
    def _group(self) -> PolicySection:
        if self.engine.kind == "vllm" and self.roles == "separate":
            raise ValueError("engine.kind vllm needs roles: adapters: it is sent the policy's adapter, not its weights")
        if self.algorithm in ("group_lag", "rloo_lag") and self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 for algorithm {self.algorithm}, not {self.num_generations}")
        if self.algorithm == "imitation" and not self.ptx_coeff:
            raise ValueError("algorithm imitation learns from demonstrations alone: set ptx_coeff above 0")
        if self.algorithm == "repo" and self.measure.kind != "mean":
            raise ValueError(f"measure.kind {self.measure.kind} needs a bound on all prompts together; algorithm repo has one for each: use measure.kind: mean")
        if self.algorithm == "repo" and self.repo.form == "per_prompt" and self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 for algorithm repo with form per_prompt, the mean of a prompt's samples, not {self.num_generations}")
        return self

    @model_validator(mode="after")
    def _dual_of_repo(self) -> PolicySection:
        """Without slack the violation of repo is never below 0, and a multiplier never falls."""
        if self.algorithm != "repo":
            return self
        dual, named = self.dual, self.dual.model_fields_set
        chosen: dict[str, Any] = {} if "kind" in named else {"kind": "additive"}
        kind = chosen.get("kind", dual.kind)
        if not self.repo.slack and "initial" not in named and kind in ("additive", "augmented"):
            chosen["initial"] = 0.0
        if chosen:  # not by assignment, which would validate again
            self.__dict__["dual"] = dual = dual.model_copy(update=chosen)
        if self.repo.slack or dual.kind in ("pid", "fixed"):
            return self
        if dual.kind == "log":
            raise ValueError("dual.kind log cannot be used with algorithm repo and repo.slack 0: the violation, mean {c}+, is never below 0, and log lambda only rises, ever faster; use dual.kind: additive from a small dual.initial, or set repo.slack above 0")
        if dual.lr and dual.initial >= dual.maximum:
            raise ValueError(f"dual.initial {dual.initial:g} is dual.maximum: with algorithm repo and repo.slack 0 the multiplier never falls, so it could not move; begin lower, at 0 for example, or use dual.kind: fixed")
        return self


class PairsSection(TrainSection):
    """Trained on pairs: direct and iterative methods."""

    ptx_coeff: NonNegative = Field(0.0, description="Weight of the cross-entropy on demonstrations beside the loss on pairs, one demonstration a pair, as policy.ptx_coeff. [ours]")
    demonstrations: Literal["all", "more_helpful", "safer", "both"] = Field("both", description="Which responses of the training pairs that term imitates; both: those preferred on both axes.")


class DPOSection(Section):
    """arXiv 2305.18290."""

    axis: Literal["more_helpful", "safer"] = Field("more_helpful", description="The preference that is learned: DPO-H or DPO-S.")


class KTOSection(Section):
    """arXiv 2402.01306."""

    axis: Literal["more_helpful", "safer"] = Field("more_helpful", description="Desirable is the more helpful response of a pair, or, on safer, every safe response.")
    desirable_weight: Rate = Field(1.0, description="Weight of desirable responses. [paper] 1")
    undesirable_weight: Rate = Field(1.0, description="Weight of the others. [paper] 1 where both are equally many")


class SACPOSection(Section):
    """arXiv 2404.11049: helpfulness, then safety from there."""

    lam: Rate = Field(4.0, description="Weight of safety: stage two has beta / lam. [code] tries 1, 2, 4, 10")
    first: Literal["dpo", "kto"] = Field("dpo", description="Algorithm of the stage on helpfulness.")
    second: Literal["dpo", "kto"] = Field("dpo", description="Algorithm of the stage on safety.")
    undesirable_weight: Rate = Field(1.0, description="Weight of undesirable responses where a stage is kto.")
    q: Share = Field(1.0, description="P-SACPO: the saved model is (1 - q) stage one + q stage two, weight by weight. [code] tries .25, .5, .75")


class SafeDPOSection(Section):
    """arXiv 2505.20065."""

    delta: NonNegative = Field(10.0, description="Margin between a safe and an unsafe response. [secondary] 10")


class BFPOSection(Section):
    """arXiv 2408.15313."""

    b1: Annotated[float, Field(gt=1)] = Field(3.0, description="Weight of safety against helpfulness. [code] 3")
    alpha: float = Field(0.5, description="Shift of the target. [code] 0.5")


class CDPOSection(Section):
    """arXiv 2403.02475. Needs a reward and a cost model."""

    labels: Literal["soft", "hard"] = Field("soft", description="soft: both orders, weighed by sig of the difference in r - lambda c; hard: the higher wins.")
    threshold: float = Field(0.0, description="Bound d on the mean cost of the policy's own answers.")
    multiplier: NonNegative = Field(1.0, description="First lambda.")
    dual_lr: NonNegative = Field(0.1, description="Step size of lambda; 0 keeps it.")
    maximum: Rate = Field(20.0, description="Largest lambda.")
    dual_steps: Positive = Field(20, description="Optimizer steps between two steps of lambda.")
    dual_prompts: Positive = Field(64, description="Prompts answered for a step of lambda.")
    max_new_tokens: Positive = Field(512, description="Longest of these answers.")

    @model_validator(mode="after")
    def _bound(self) -> CDPOSection:
        if self.multiplier > self.maximum:
            raise ValueError(f"multiplier {self.multiplier:g} is above maximum {self.maximum:g}")
        return self


class MMDPOSection(Section):
    """arXiv 2502.10391. Needs a reward model."""

    w: NonNegative = Field(0.5, description="How much more a wide reward margin counts. [secondary] 0.5")
    k: NonNegative = Field(0.5, description="How fast that share is reached. [secondary] 0.5")
    sft_weight: NonNegative = Field(0.25, description="Weight of imitating the more helpful response. [secondary] 0.25")


class DirectSection(PairsSection):
    """Trained on the pairs themselves, without sampling: DPO and its safe variants."""

    algorithm: Literal["dpo", "kto", "sacpo", "safe_dpo", "bfpo", "c_dpo", "mm_dpo"] = Field("dpo", description="dpo, kto: one preference; sacpo: helpfulness, then safety; safe_dpo, bfpo: both at once; c_dpo: cost at or under a bound; mm_dpo: weighed by reward margins.")
    beta: Rate = Field(0.1, description="Weight of the KL to the reference. [paper] 0.1")
    learning_rate: Rate = Field(2e-5, description="Peak learning rate. [code] 2e-5 for full weights (SACPO); adapters want about 1e-4 [ours]")
    reference: Location | None = Field(None, description="Reference model; null takes the one that training starts from.")
    reward_model: Location | None = Field(None, description="Folder of the reward model, for c_dpo and mm_dpo; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description="Folder of the cost model, for c_dpo and mm_dpo; null takes <output_dir>/cost.")
    dpo: DPOSection = Field(DPOSection(), description="Used by algorithm: dpo.")
    kto: KTOSection = Field(KTOSection(), description="Used by algorithm: kto.")
    sacpo: SACPOSection = Field(SACPOSection(), description="Used by algorithm: sacpo.")
    safe_dpo: SafeDPOSection = Field(SafeDPOSection(), description="Used by algorithm: safe_dpo.")
    bfpo: BFPOSection = Field(BFPOSection(), description="Used by algorithm: bfpo.")
    c_dpo: CDPOSection = Field(CDPOSection(), description="Used by algorithm: c_dpo.")
    mm_dpo: MMDPOSection = Field(MMDPOSection(), description="Used by algorithm: mm_dpo.")


class IterativeSection(PairsSection):
    """Reward is raised while cost falls by at least `bounds` below the start model's, by DPO on relabelled samples."""

    algorithm: Literal["caid", "pecaid", "mocan", "pecan"] = Field("caid", description="mocan, caid: one or several multipliers found on samples, with reward and cost model; pecan, pecaid: the same with two DPO policies in their place.")
    bounds: float | dict[str, float] = Field(3.0, description="b: by how much the mean cost must fall below the start model's. A number, or one for each of some primary categories ('all' for every prompt). [paper] 3 to 9")
    iterations: Positive = Field(4, description="Trainings, each at the multipliers that the one before it asked for; mocan and pecan have one. [paper] 4")
    beta: Rate = Field(0.1, description="Weight of the KL to the start model, also of DPO. [paper] 0.1")
    eta: Rate | Literal["auto"] = Field("auto", description="Step size of the multipliers. auto: from the one-shot solution, then from what each iteration shows. [ours]")
    prompts: Positive = Field(600, description="Prompts on which multipliers and constraints are measured. [paper] 600")
    samples: Annotated[int, Field(ge=2)] = Field(64, description="Responses to each of them. [paper] 64")
    pair_prompts: Positive | None = Field(None, description="Prompts trained on; null takes all.")
    pair_samples: Annotated[int, Field(ge=2, multiple_of=2)] = Field(2, description="Responses to each of them, compared two by two. [ours]")
    pairs_from: Literal["reference", "policy"] = Field("reference", description="Whose responses are compared: the start model's, drawn once, or those of the iteration before. [ours]")
    start_from: Literal["previous", "reference"] = Field("previous", description="Each training goes on from the policy of the one before, or starts over. [ours]")
    reward_model: Location | None = Field(None, description="Folder of the reward model; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description="Folder of the cost model; null takes <output_dir>/cost.")
    helpful_policy: Location | None = Field(None, description="For pecan and pecaid: a policy trained by DPO on more_helpful, from the same start with the same beta.")
    safe_policy: Location | None = Field(None, description="For pecan and pecaid: the same on safer.")
    num_train_epochs: Rate = Field(1.0, description="Passes over the pairs, each iteration. [paper] 1")
    learning_rate: Rate = Field(5e-4, description="Peak learning rate. [paper] 5e-4 with adapters of rank 8, alpha 16")
    max_new_tokens: Positive = Field(512, description="Longest sampled response; those that are cut off are not trained on.")
    rows_at_once: Positive = Field(64, description="Responses generated and scored together.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Level of the intervals of each iteration's figures.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(1000, description="Resamples of these intervals.")


class GuardSection(TrainSection):
    """A classifier of queries and responses: safe or not, category, four levels of severity."""

    head_learning_rate: Rate = Field(1e-3, description="Learning rate of the heads, which start from nothing. [ours]")
    unsafe_weight: NonNegative = Field(1.0, description="Weight of the safe / unsafe loss. [ours]")
    severity_weight: NonNegative = Field(1.0, description="Weight of the severity loss. [ours]")
    category_weight: NonNegative = Field(0.5, description="Weight of the category loss. [ours]")
    calibration_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Share of the training prompts kept for the temperatures; 0 fits none. [ours]")
    benign: Location | None = Field(None, description="Data whose prompts are harmless, where data.path has only harmful ones (as BeaverTails-V); without it queries are not learned.")
    path: Location | None = Field(None, description="Folder of a trained guard to use; null takes <output_dir>/guard.")
    policy: Location | None = Field(None, description="YAML file of what the guard does at which severity; null takes the one saved with it.")
    max_rounds: Count = Field(5, description="Rounds of filter and regenerate before the guard gives up. [paper] 5")


class RefinementSection(Section):
    """Student-teacher dialogues with feedback (FIRE, NeurIPS 2024). Training itself goes by the sft section."""

    correct: Annotated[int, Field(ge=1, le=10)] = Field(8, description="Score from which an answer counts as right. [code] 8")
    max_turns: Positive = Field(5, description="Answers of a dialogue at most. [ours]")
    leak_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Feedback that says more than this share of the true answer's unsaid words is withheld; raise it for long true answers. [ours]")
    first_turns: Literal["none", "correct", "all"] = Field("correct", description="First answers that a student imitates beside its improved ones; all keeps its first answers as they are. [ours]")
    safety: Literal["oracle", "guard", "none"] = Field("oracle", description="Who tells the oracle teacher what is unsafe; none scores help alone, as the paper. [ours]")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="Share of the dialogues' prompts that a trained student or teacher is measured on. [ours]")


class GenerationSection(Section):
    max_new_tokens: Positive = Field(512, description="Longest response.")
    temperature: NonNegative = Field(1.0, description="0 is greedy decoding.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling.")
    top_k: Count = Field(0, description="Sample among the k likeliest tokens; 0 is off.")
    batch_size: Positive = Field(8, description="Prompts a forward pass.")


class EvaluationSection(Section):
    model: Location | None = Field(None, description="Aligned model to measure; null takes <output_dir>/policy.")
    base: Location | None = Field(None, description="Model it is compared with; null takes the one the policy started from.")
    samples: Positive = Field(1, description="Responses a prompt.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="Level of the intervals.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(4000, description="Resamples of the intervals.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="Chance that the safety test (HC-RLHF) lets a policy pass whose mean cost is above the threshold.")
    guard_rounds: bool = Field(True, description="Also measure the guard's filter-and-regenerate loop, where there is a guard.")
    examples: Count = Field(8, description="Example prompts shown in the report.")


class Settings(Section):
    output_dir: Location = Field("runs/default", description="Everything a run writes goes below this folder.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of weights, data order and sampling.")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sft: SFTSection = SFTSection()
    reward: RewardSection = RewardSection()
    cost: CostSection = CostSection()
    guard: GuardSection = GuardSection()
    policy: PolicySection = PolicySection()
    direct: DirectSection = DirectSection()
    iterative: IterativeSection = IterativeSection()
    refinement: RefinementSection = RefinementSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _quantized_means_adapters(self) -> Settings:
        if self.model.quantization and self.policy.roles == "separate":
            raise ValueError(f"model.quantization {self.model.quantization} needs policy.roles: adapters, not separate")
        return self

    def save(self, path: str | Path) -> None:
        """Write every setting, defaults included, as YAML that `load_settings` reads back to the same settings.

        Whole or not at all. A rule of the multiplier that nobody named is left out: it goes by the algorithm, which
        who reads the file may change.
        """
        unnamed = {"kind", "initial"} - self.policy.dual.model_fields_set
        replace_text(path, dump_yaml(self.model_dump(mode="json", exclude={"policy": {"dual": unnamed}})))


def load_settings(path: str | Path | None = None, overrides: Sequence[str] = (), *, section: str = "") -> Settings:
    """Settings from a YAML file (null: the defaults) with `section.key=value` overrides. Raises SettingsError.

    section: that of the stage at hand; an unknown key is looked for there first.
    """
    return load(Settings, path, overrides, section=section)
