"""What the parts of a run take as arguments. Sections of settings are made of these, so that each is declared once.

Names are those of transformers and TRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from safe_rlhf_v.fields import Count, NonNegative, Positive, Rate, Share, ShareBelow1

# Those of transformers that need nothing but a number of steps.
Schedule = Literal[
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear", "polynomial"
]  # fmt: skip
# AdamW as transformers names it, of torch and of bitsandbytes.
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the linear layers of the language model; vision tower and output layer stay as they are.

    targets: "all" for every linear layer of the language model, or a regex matched against its layers' own names
    ("q_proj|v_proj").
    """

    r: Annotated[Positive, "Rank of the adapters."] = 16
    alpha: Annotated[Positive, "Scale of the adapters; the update is multiplied by alpha / r."] = 32
    dropout: Annotated[
        Share,
        "Dropout on the adapters' input in supervised stages; the policy trains without, or its old and new "
        "log-probabilities would differ by chance.",
    ] = 0.0
    targets: str = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; top_p 1 and top_k 0 leave the distribution whole.

    Policy-gradient training wants it whole: `token_logps` knows the temperature and the suppressed ids, not top-p.
    """

    max_new_tokens: Annotated[Positive, "Longest response."] = 512
    temperature: Annotated[NonNegative, "0 is greedy decoding."] = 1.0
    top_p: Annotated[float, Gt(0), Le(1), "Nucleus sampling."] = 1.0
    top_k: Annotated[Count, "Sample among the k likeliest tokens; 0 is off."] = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"{self}: max_new_tokens must be at least 1, temperature and top_k at least 0, top_p in (0, 1]"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions:
    """What only a guard needs beside the settings of every stage. All [ours].

    picture_cache: bytes of image features kept between epochs, where the vision tower is frozen.
    """

    head_learning_rate: Annotated[Rate, "Learning rate of the heads, which start from nothing. [ours]"] = 1e-3
    unsafe_weight: Annotated[NonNegative, "Weight of the safe / unsafe loss. [ours]"] = 1.0
    severity_weight: Annotated[NonNegative, "Weight of the severity loss. [ours]"] = 1.0
    category_weight: Annotated[NonNegative, "Weight of the category loss. [ours]"] = 0.5
    calibration_share: Annotated[
        ShareBelow1, "Share of the training prompts kept for the temperatures; 0 fits none. [ours]"
    ] = 0.1
    picture_cache: int = 1024 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Of a dialogue with feedback."""

    correct: Annotated[int, Ge(1), Le(10), "Score from which an answer counts as right. [code] 8"] = 8
    max_turns: Annotated[Positive, "Answers of a dialogue at most. [ours]"] = 5
    leak_share: Annotated[
        ShareBelow1,
        "Feedback that says more than this share of the true answer's unsaid words is withheld; raise it for long true "
        "answers. [ours]",
    ] = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.correct <= 10 or self.max_turns < 1 or not 0 <= self.leak_share < 1:
            raise ValueError(f"{self}: correct is in 1..10, max_turns at least 1, leak_share in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class IterativeArguments:
    """Of the loop of iterative dualisation. One iteration is one-shot. eta "auto" begins with the problem's step sizes
    and follows what each iteration shows (`adapted_rates`) [ours]."""

    output_dir: str | Path
    iterations: Annotated[
        Positive,
        "Trainings, each at the multipliers that the one before it asked for; one-shot algorithms have one. [paper] 4",
    ] = 4
    eta: Annotated[
        Rate | Literal["auto"],
        "Step size of the multipliers. auto: from the one-shot solution, then from what each iteration shows. [ours]",
    ] = "auto"
    confidence: Annotated[float, Gt(0), Lt(1), "Level of the intervals of each iteration's figures."] = 0.95
    bootstrap: Annotated[int, Ge(100), "Resamples of these intervals."] = 1000

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations: {self.iterations} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineArguments:
    """Of the online loop; a step is a rollout. beta, threshold and clip ranges are the algorithm's, the multiplier's
    the dual's.

    per_device_train_batch_size: N prompts; num_generations: G samples of each. mini_batch_size: rows of an optimizer
    step a device, of the B = N*G. per_device_micro_batch_size and per_device_micro_batch_tokens bound one forward
    pass, in rollouts and updates alike.
    max_steps also ends schedules that fall (cosine, linear): resume them with another max_steps and they fall anew.
    """

    output_dir: str | Path
    seed: int = 0
    disable_tqdm: bool = False
    max_steps: Annotated[Positive, "Rollouts."] = 1000
    per_device_train_batch_size: Annotated[Positive, "Prompts a rollout a device. [code] 4"] = 4
    num_generations: Annotated[Positive, "Samples a prompt; group_lag and rloo_lag need at least 2."] = 1
    num_ppo_epochs: Annotated[Positive, "Passes over each rollout."] = 1
    mini_batch_size: Annotated[Positive, "Samples an optimizer step."] = 4
    per_device_micro_batch_size: Annotated[
        Positive | None,
        "Samples a forward pass, those of like length or of one prompt together, to save memory; the gradient is "
        "the same. null takes all. Halved when memory runs out.",
    ] = None
    per_device_micro_batch_tokens: Annotated[
        Positive | None,
        "Tokens a forward pass, pads included; saves memory and, where lengths differ, time. null: no bound.",
    ] = None
    learning_rate: Annotated[
        Rate,
        "Learning rate of the policy. [code] 5e-7 for full weights; adapters want about 1e-5 [ours]",
    ] = 5e-7
    critic_learning_rate: Annotated[Rate, "Learning rate of both critics. [code] 5e-7"] = 5e-7
    lr_scheduler_type: Annotated[Schedule, "Schedule as in transformers."] = "constant"
    optim: Annotated[
        Optimizer,
        "AdamW as transformers names it. Those of bitsandbytes (the gpu extra) keep their moments in 8 bits, or "
        "(paged) where they may move to the host's memory.",
    ] = "adamw_torch"
    warmup_steps: Annotated[NonNegative, "Warm-up steps."] = 0
    max_grad_norm: Annotated[Rate, "Gradients are scaled down to this norm."] = 1.0
    weight_decay: Annotated[NonNegative, "AdamW weight decay."] = 0.0
    ptx_coeff: Annotated[
        NonNegative,
        "Weight of the cross-entropy on demonstrations (the responses sft.responses picks) beside the policy "
        "loss. [code] 16",
    ] = 16.0
    max_new_tokens: Annotated[Positive, "Longest sampled response. [code] 512"] = 512
    temperature: Annotated[Rate, "Sampling temperature of rollouts. [code] 1"] = 1.0
    guidance_rollouts: Annotated[
        Count,
        "Rollouts of the start model whose costs are shown against the threshold before training.",
    ] = 4
    save_steps: Annotated[
        Positive,
        "Write a checkpoint every so many rollouts; a killed run resumes from it bit for bit.",
    ] = 50
    save_total_limit: Annotated[Positive | None, "Checkpoints kept; null keeps all."] = 1
    logging_steps: Annotated[Positive, "Write metrics.jsonl every so many rollouts."] = 1
    report_to: Annotated[list[str], "Trackers, for example [tensorboard]."] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", str(self.output_dir))
        object.__setattr__(self, "report_to", [x for x in self.report_to if x != "none"])
        positive = (
            "max_steps", "per_device_train_batch_size", "num_generations", "num_ppo_epochs", "mini_batch_size",
            "per_device_micro_batch_size", "per_device_micro_batch_tokens", "max_new_tokens", "save_steps",
            "save_total_limit", "logging_steps", "temperature", "max_grad_norm",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} must be above 0")
        rates = ("learning_rate", "critic_learning_rate", "weight_decay", "warmup_steps", "ptx_coeff")
        for name in (*rates, "guidance_rollouts"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must not be below 0")
