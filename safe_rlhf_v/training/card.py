"""The model card of a trained model: facts of the run, nothing else."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safe_rlhf_v.config import Settings

PURPOSE = {
    "sft": "A vision-language model fine-tuned to imitate responses of a preference data set.",
    "reward": "Scores how helpful a response to a prompt with pictures is, safety ignored. Higher is more helpful.",
    "cost": "Scores how harmful a response to a prompt with pictures is. Above 0 is unsafe; higher is worse.",
    "policy": "A vision-language model trained to raise reward while its mean cost is held at or under a bound.",
    "direct": "A vision-language model trained on preference pairs directly, without reinforcement learning.",
    "iterative": "A vision-language model trained to raise reward while its cost falls by a given amount.",
    "guard": "Judges queries and responses with pictures: unsafe or not, category, severity.",
    "student": "Answers questions about pictures, and answers again when given feedback on its answer.",
    "teacher": "Scores answers to questions about pictures, 1 to 10, given the true answer, and writes feedback.",
}
LIMITS = {
    "sft": "Imitation keeps what the responses hold, the unsafe ones included where they were picked.",
    "reward": "It says nothing of safety, and is only trustworthy on data like that it was trained on.",
    "cost": "Its zero is calibrated on the training data; measure sign accuracy on your own before relying on it.",
    "policy": "The bound holds for the cost model's mean on prompts like those trained on, not for every response.",
    "direct": "It was never sampled in training (C-DPO apart): measure its own answers before relying on them.",
    "iterative": "The improvement is the cost model's, a mean over prompts like those trained on, not each response's.",
    "guard": "Measure it on your own traffic before relying on it; it will miss what its training data lacks.",
    "student": "It imitates answers that improved, not answers that are right, and first answers as the settings say.",
    "teacher": "Its scores and feedback are as good as those it imitates; it needs the true answer.",
}


def write_card(folder: str | Path, kind: str, base: str, settings: Settings, measured: Mapping[str, Any]) -> None:
    """Write README.md. measured: what metrics.json holds; nested mappings become tables."""
    flat = {name: value for name, value in measured.items() if not isinstance(value, Mapping)}
    tables = [_table("Run", flat)] + [_table(n, v) for n, v in measured.items() if isinstance(v, Mapping)]
    data = settings.data
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))
    text = f"""---
library_name: safe-rlhf-v
tags: [safe-rlhf-v, {kind}]
---
# {Path(folder).name}: {kind}

{PURPOSE[kind]}

- Base: `{base}`
- Data: `{data.path}`, split `{data.train_split}`; measured on split `{data.evaluation_split}`
- Seed: {settings.seed}. Every setting: `settings.yaml`
- Python {platform.python_version()}, {packages}

{"".join(tables)}
## Limits
{LIMITS[kind]} The licences of the base model and of the data apply.
"""
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"| {name} | {_show(value)} |\n" for name, value in values.items() if value is not None)
    return f"## {title.replace('_', ' ').capitalize()}\n| | |\n|---|---|\n{rows}\n"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
