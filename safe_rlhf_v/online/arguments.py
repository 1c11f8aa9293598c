"""The arguments of the online loop, and those in which a resumed run may differ."""

from __future__ import annotations

from safe_rlhf_v.arguments import OnlineArguments

__all__ = ["MAY_DIFFER", "OnlineArguments"]

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
