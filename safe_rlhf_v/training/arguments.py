"""Arguments of the online loop. Names as in transformers and TRL; a step is a rollout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A resumed run may differ in these: they change where and when things are written, or how far the run goes, or (the
# micro-batch) the last digit of a sum, and nothing else. Rows a process may differ where the rows of all processes
# together do not: `OnlineTrainer` compares those.
MAY_DIFFER = frozenset(
    f"arguments.{name}"
    for name in (
        "output_dir", "max_steps", "save_steps", "save_total_limit", "logging_steps", "report_to", "disable_tqdm",
        "guidance_rollouts", "multiplier_patience", "per_device_micro_batch_size",
        "per_device_train_batch_size", "mini_batch_size",
        "per_device_micro_batch_tokens",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineArguments:
    """Settings of `OnlineTrainer`. beta, threshold and clip ranges are the algorithm's, the multiplier's the dual's.

    max_steps: rollouts. per_device_train_batch_size: prompts a rollout a device (N); num_generations: samples a prompt
    (G). mini_batch_size: rows of an optimizer step a device, of the B = N*G. per_device_micro_batch_size and
    per_device_micro_batch_tokens: rows and tokens, pads included, of one forward pass, in rollouts and updates alike,
    those of like length or of one prompt together (None: all; the gradient is the same); rows are halved when memory
    runs out.
    learning_rate 5e-7 is the published one for full weights [code]; adapters want about 1e-5 [ours].
    optim: AdamW by its name in transformers, of torch or of bitsandbytes.
    max_steps also ends schedules that fall (cosine, linear): resume them with another max_steps and they fall anew.
    ptx_coeff: weight of the cross-entropy on demonstrations, where the trainer is given any [code].
    guidance_rollouts: rollouts of the start model whose costs are shown against the threshold before training.
    """

    output_dir: str | Path
    seed: int = 0
    max_steps: int = 1000
    per_device_train_batch_size: int = 4
    num_generations: int = 1
    num_ppo_epochs: int = 1
    mini_batch_size: int = 4
    per_device_micro_batch_size: int | None = None
    per_device_micro_batch_tokens: int | None = None
    learning_rate: float = 5e-7
    critic_learning_rate: float = 5e-7
    weight_decay: float = 0.0
    lr_scheduler_type: str = "constant"
    optim: str = "adamw_torch"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    ptx_coeff: float = 16.0
    max_new_tokens: int = 512
    temperature: float = 1.0
    save_steps: int = 50
    save_total_limit: int | None = 1
    logging_steps: int = 1
    report_to: tuple[str, ...] = ()
    disable_tqdm: bool = False
    guidance_rollouts: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", str(self.output_dir))
        object.__setattr__(self, "report_to", tuple(x for x in self.report_to if x != "none"))
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
