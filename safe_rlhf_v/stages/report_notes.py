"""What a report warns of: prompts that were trained on, prompts that the guard could not judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beavertails_v import Leakage, Prompt, leakage, load_responses
from safe_rlhf_v.stages.stages import STAGES


def leakage_notes(output: Path, source: str, prompts: Sequence[Prompt]) -> list[str]:
    """A warning for each training split of a stage below `output` that shares prompts or pictures with these.

    A split on this machine is read once more, header of pictures only; one that is gone is passed over. source:
    data.path.
    """
    files = [output / stage / "stage.json" for stage in STAGES]
    made = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    keys = ("data.path", "data.train_split", "data.revision", "data.columns")
    sources = dict.fromkeys(tuple(x.get(key) for key in keys) for x in made)
    notes = []
    for path, split, revision, columns in sources:
        if Path(path).exists() or path == source:
            train = load_responses(path, split, revision=revision, columns=columns, check_images="header")
            notes += _leaks(leakage(train.prompts(), prompts), len(prompts), f"{path} [{split}]")
    return notes


def not_judged(rounds: Sequence[dict[str, Any]]) -> list[str]:
    count = rounds[-1]["not_judged"] if rounds else 0
    return [f"The guard could not judge {count} prompt{'s' * (count != 1)} of its loop, and refused."] if count else []


def _leaks(found: Leakage, count: int, source: str) -> list[str]:
    same = {i for _, rows in found.prompts.values() for i in rows}
    alike = {i for _, rows in found.pictures.values() for i in rows} - same
    if not same | alike:
        return []
    return [
        f"Leakage: {len(same | alike)} of {count} evaluation prompts are known from the training data {source}: "
        f"{len(same)} stand there word for word with their pictures, {len(alike)} share{'s' * (len(alike) == 1)} a "
        "picture alone. Results on them may be memory; `safe-rlhf-v data leakage` lists the training rows to leave out."
    ]
