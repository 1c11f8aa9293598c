"""Student-teacher dialogues over picture questions: what one is, and how they are stored.

A folder holds `dialogues.jsonl`, one dialogue a line, and `pictures/`, each picture once, named by its content:

    {"question": "...", "images": ["pictures/0a1b.png"], "truth": "...",
     "turns": [{"thought": "", "answer": "...", "score": 4, "feedback": "...", "withheld": null}]}

After FIRE (NeurIPS 2024): the student answers, a teacher that knows the truth scores and gives feedback, the student
answers again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.images import DEFAULT_LIMITS, ImageError, ImageLimits
from beavertails_v.report import Dropped, LoadReport, without_place
from beavertails_v.schema import Prompt, SchemaError, Severity
from beavertails_v.store import JsonlPart

FILE, PICTURES = "dialogues.jsonl", "pictures"
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
FIELDS = {"question", "images", "truth", "turns", "category", "severity", "meta", "source"}


class DialogueError(UserError, ValueError):
    """Dialogues cannot be read or written. The message names the file and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The student's reply and the teacher's.

    score: 1 (bad) to 10 (perfect); 0 where the teacher's reply could not be read. feedback: what the student is shown.
    withheld: what the teacher wrote in its place, where that gave the answer away; else None.
    """

    answer: str
    score: int
    feedback: str = ""
    thought: str = ""
    withheld: str | None = None

    def __post_init__(self) -> None:
        for name in ("answer", "feedback", "thought"):
            if not isinstance(getattr(self, name), str):
                raise SchemaError(f"field '{name}': {getattr(self, name)!r} is not text")
        if self.withheld is not None and not isinstance(self.withheld, str):
            raise SchemaError(f"field 'withheld': {self.withheld!r} is neither text nor null")
        if isinstance(self.score, bool) or not isinstance(self.score, int) or not 0 <= self.score <= 10:
            raise SchemaError(f"field 'score': {self.score!r} is not a whole number in 0..10 (0: could not be read)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A question with pictures, the true answer that only the teacher sees, and at least one turn.

    source: how it came to be, for example "free/guided".
    """

    prompt: Prompt
    truth: str
    turns: tuple[Turn, ...]
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.turns:
            raise SchemaError("field 'turns': a dialogue has at least one turn")
        if not isinstance(self.truth, str) or not self.truth.strip():
            raise SchemaError("field 'truth': the true answer is missing; the teacher cannot judge without it")

    @property
    def scores(self) -> tuple[int, ...]:
        return tuple(turn.score for turn in self.turns)


def write_dialogues(dialogues: Iterable[Dialogue], folder: str | Path) -> Path:
    """Write a folder of dialogues; returns its jsonl file, which appears whole or not at all."""
    folder = Path(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    partial = folder / (FILE + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for dialogue in dialogues:
            file.write(json.dumps(_to_row(dialogue, folder), ensure_ascii=False) + "\n")
    os.replace(partial, folder / FILE)
    return folder / FILE


def _to_row(dialogue: Dialogue, folder: Path) -> dict[str, Any]:
    prompt = dialogue.prompt
    row: dict[str, Any] = {"question": prompt.text, "images": [_store(image, folder) for image in prompt.images]}
    row |= {"truth": dialogue.truth, "turns": [asdict(turn) for turn in dialogue.turns]}
    extras: dict[str, Any] = {"category": prompt.category, "meta": dict(prompt.meta) or None, "source": dialogue.source}
    extras["severity"] = None if prompt.severity is None else int(prompt.severity)
    return row | {name: value for name, value in extras.items() if value is not None}


def _store(image: Any, folder: Path) -> str:
    """The picture's name below the folder; its bytes are written as they came, once."""
    data = image.encoded()
    suffix = next((s for magic, s in SUFFIXES.items() if data.startswith(magic)), "")
    name = f"{PICTURES}/{image.sha256[:32]}{suffix}"
    if not (folder / name).is_file():
        (folder / name).write_bytes(data)
    return name


def load_dialogues(
    source: str | Path, *, limits: ImageLimits = DEFAULT_LIMITS, check_images: bool = True
) -> tuple[list[Dialogue], LoadReport]:
    """Dialogues of a folder (or its jsonl file), and a report that lists every row left out with file, row and field.

    check_images: decode every picture now. Raises DialogueError where there is no such file, or no row is left.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise DialogueError(f"{path}: no such file; make dialogues with `safe-rlhf-v refine dialogues`")
    part, report, kept = JsonlPart(path), LoadReport(source=str(path), split="dialogues"), []
    for i in range(len(part)):
        try:
            kept.append(_from_row(part.row(i), part.pictures(i, limits) if "" not in part.row(i) else (), check_images))
        except (SchemaError, ImageError) as error:
            reason = "undecodable" if isinstance(error, ImageError) else "invalid"
            row, detail = part.number(i), without_place(str(error), part.path, part.number(i))
            report.dropped.append(Dropped(file=str(path), row=row, reason=reason, detail=detail))
    report.kept = len(kept)
    if not kept:
        raise DialogueError(f"no dialogue is left: {report.summary()}")
    return kept, report


def _from_row(row: Mapping[str, Any], images: tuple[Any, ...], check_images: bool) -> Dialogue:
    if "" in row:
        raise SchemaError(row[""])
    if unknown := sorted(set(row) - FIELDS):
        raise SchemaError(f"field {unknown[0]!r} is not one of {', '.join(sorted(FIELDS))}")
    for name, kind in (("question", str), ("truth", str), ("turns", list)):
        if not isinstance(row.get(name), kind):
            raise SchemaError(f"field {name!r}: {row.get(name)!r} is not {'text' if kind is str else 'a list'}")
    severity, meta = row.get("severity"), row.get("meta", {})
    if severity not in (None, 0, 1, 2, 3) or isinstance(severity, bool):
        raise SchemaError(f"field 'severity': {severity!r} is not in 0..3")
    if not isinstance(meta, dict):
        raise SchemaError(f"field 'meta': {meta!r} is not an object")
    for image in images if check_images else ():
        image.check()
    prompt = Prompt(
        text=row["question"],
        images=images,
        category=row.get("category"),
        severity=None if severity is None else Severity(severity),
        meta=meta,
    )
    turns = tuple(_turn(turn, k) for k, turn in enumerate(row["turns"], 1))
    return Dialogue(prompt=prompt, truth=row["truth"], turns=turns, source=row.get("source"))


def _turn(value: Any, k: int) -> Turn:
    known = set(Turn.__dataclass_fields__)
    if not isinstance(value, dict) or not {"answer", "score"} <= set(value) <= known:
        raise SchemaError(f"field 'turns': turn {k} needs 'answer' and 'score', and may have {sorted(known)} alone")
    try:
        return Turn(**value)
    except SchemaError as error:
        raise SchemaError(f"turn {k}: {error}") from error
