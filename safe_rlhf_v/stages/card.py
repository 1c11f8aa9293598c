"""The model card of a trained model: facts of the run, nothing else."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safe_rlhf_v.config import DataSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is said of every model of a kind: what it is for, and where not to rely on it."""

    kind: str
    purpose: str
    limits: str


def write_card(
    folder: str | Path, card: Card, base: str, data: DataSection, seed: int, measured: Mapping[str, Any]
) -> None:
    """Write README.md. measured: nested mappings become tables."""
    flat = {name: value for name, value in measured.items() if not isinstance(value, Mapping)}
    tables = [_table("Run", flat)] + [_table(n, v) for n, v in measured.items() if isinstance(v, Mapping)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))
    text = f"""---
library_name: safe-rlhf-v
tags: [safe-rlhf-v, {card.kind}]
---
# {Path(folder).name}: {card.kind}

{card.purpose}

- Base: `{base}`
- Data: `{data.path}`, split `{data.train_split}`; measured on split `{data.evaluation_split}`
- Seed: {seed}. Every setting: `settings.yaml`
- Python {platform.python_version()}, {packages}

{"".join(tables)}
## Limits
{card.limits} The licences of the base model and of the data apply.
"""
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"| {name} | {_show(value)} |\n" for name, value in values.items() if value is not None)
    return f"## {title.replace('_', ' ').capitalize()}\n| | |\n|---|---|\n{rows}\n"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
