"""Which kind of model a folder of this project holds, so that no stage takes one kind for another."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safe_rlhf_v.vlm.source import ModelError

SCORERS = ("reward", "cost")
OTHERWISE = {
    "guard": "a guard, which judges and does not answer",
    "reward": "a reward model, which scores answers and gives none",
    "cost": "a cost model, which scores answers and gives none",
    "heads": "a model with heads, which scores answers and gives none",
}
CARD = re.compile(r"^tags: \[safe-rlhf-v, (\w+)\]$", re.MULTILINE)


def kind_of(path: str | Path) -> str:
    """guard, reward or cost; heads of a scoring model that does not say which; answers of everything else."""
    folder = Path(path)
    if (folder / "guard.json").is_file():
        return "guard"
    if not (folder / "headed.json").is_file():
        return "answers"
    return _stated(folder / "headed.json") or _carded(folder / "README.md") or "heads"


def _stated(file: Path) -> str | None:
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError):  # whoever loads the model names the damaged file
        return None
    return kind if kind in SCORERS else None


def _carded(file: Path) -> str | None:
    """By the model card: folders of before headed.json said it."""
    found = CARD.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return found[1] if found and found[1] in SCORERS else None


def require_answering(path: str | Path, key: str = "") -> str:
    """The path of a model that answers. Raises ModelError for a folder whose model scores or judges.

    key: the setting that names it.
    """
    if (kind := kind_of(path)) != "answers":
        raise ModelError(f"{_named(path, key)} holds {OTHERWISE[kind]}: name the folder of a model that answers")
    return str(path)


def require_scorer(path: str | Path, kind: str, key: str) -> str:
    """The path of a reward or cost model, as kind says. Raises ModelError for a folder of any other."""
    folder, wanted = Path(path), f"give the folder that `train {kind}` wrote"
    if not folder.is_dir():
        raise ModelError(f"{key} = {path}: no such folder; {wanted}")
    found = kind_of(folder)
    if found == "answers":
        raise ModelError(
            f"{_named(path, key)} has no headed.json, so it is no {kind} model or has lost its head; {wanted}"
        )
    if found not in (kind, "heads"):
        raise ModelError(
            f"{_named(path, key)} holds {OTHERWISE[found].partition(',')[0]}, not a {kind} model; {wanted}"
        )
    return str(path)


def _named(path: str | Path, key: str) -> str:
    return f"{key} = {path}" if key else str(path)
