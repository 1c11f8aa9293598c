"""The experiment of feedback refinement on the picture world: does feedback help, after how much training?"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from beavertails_v.dialogues import Dialogue, load_dialogues, write_dialogues
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.refinement.comparison import Arm, Comparison, Judged, arm, difference, judged
from safe_rlhf_v.refinement.model_teacher import ModelTeacher
from safe_rlhf_v.refinement.oracle_teacher import OracleTeacher
from safe_rlhf_v.refinement.protocol import Mode, Teacher, run_dialogues
from safe_rlhf_v.refinement.report import write_page
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.folder import run_stage
from safe_rlhf_v.stages.refine import Replies, cases, fit, oracle_teacher, rules
from safe_rlhf_v.statistics import Resampling

LABELS = {
    "base blind": "untrained, blind: answers afresh",
    "base guided": "untrained, sees the feedback",
    "trained blind": "trained, blind: answers afresh",
    "trained neutral": "trained, sees empty feedback",
    "trained guided": "trained, sees the feedback",
    "trained by teacher": "trained, taught by a trained teacher",
    "base blind by guard": "guard's word: untrained, blind",
    "base guided by guard": "guard's word: untrained, sees it",
    "trained by guard": "guard's word: trained, sees it",
}
PAIRS = (
    ("base blind", "base guided"),
    ("base blind", "trained blind"),
    ("trained blind", "trained neutral"),
    ("trained neutral", "trained guided"),
    ("base blind", "trained guided"),
    ("trained guided", "trained by guard"),
    ("trained guided", "trained by teacher"),
    ("base blind by guard", "base guided by guard"),
    ("base blind by guard", "trained by guard"),
    ("base guided by guard", "trained by guard"),
)


def compare(settings: Settings, sizes: Sequence[int], *, overwrite: bool = False) -> tuple[Path, dict[str, Any]]:
    """Run all of it below <output_dir>/refinement; returns the page and the headline figures. Stages are kept."""
    start, begin = build.start_model(settings), time.monotonic()
    if overwrite:
        shutil.rmtree(Path(settings.output_dir) / "refinement", ignore_errors=True)
    asked = cases(settings, "evaluation")
    if not all("picture_world" in case.prompt.meta for case in asked):
        raise SettingsError(
            f"data.path {settings.data.path}: the comparison needs the picture world, whose truth is known"
        )
    with_guard = settings.model_copy(update={"refinement": settings.refinement.model_copy(update={"safety": "guard"})})
    guarded = oracle_teacher(with_guard)
    training = _dialogues(settings, start, max(sizes))
    trained = {size: _trained(settings, training[:size], start, size) for size in sizes}
    base, student = Replies(start, settings), Replies(_folder(settings, "student", sizes[-1]), settings)
    model_teacher = Replies(_folder(settings, "teacher", sizes[-1]), settings, greedy=True)
    oracle = OracleTeacher("oracle")
    arms: dict[str, tuple[Replies, Teacher, Mode]] = {
        "base blind": (base, oracle, "blind"),
        "base guided": (base, oracle, "guided"),
        "trained blind": (student, oracle, "blind"),
        "trained neutral": (student, oracle, "neutral"),
        "trained guided": (student, oracle, "guided"),
        "trained by teacher": (student, ModelTeacher(model_teacher, model_teacher.form), "guided"),
        "base blind by guard": (base, guarded, "blind"),
        "base guided by guard": (base, guarded, "guided"),
        "trained by guard": (student, guarded, "guided"),
    }

    def talk(replies: Replies, teacher: Teacher, mode: Mode) -> Judged:
        torch.manual_seed(settings.seed)
        return judged(run_dialogues(replies, teacher, asked, replies.form, rules(settings), mode), rules(settings))

    found = {name: talk(*how) for name, how in arms.items()}
    baseline, section = found["base blind"], settings.evaluation
    resampling = Resampling(level=section.confidence, draws=section.bootstrap, seed=settings.seed)
    measured = [arm(n, LABELS[n], j, baseline, rules(settings), resampling) for n, j in found.items()]
    curve = [_point(0, found["base guided"], baseline, {}, settings)]
    for size in sizes[:-1]:
        guided = talk(Replies(_folder(settings, "student", size), settings), oracle, "guided")
        curve.append(_point(size, guided, baseline, trained[size], settings))
    curve.append(_point(sizes[-1], found["trained guided"], baseline, trained[sizes[-1]], settings))
    result = Comparison(
        arms=measured,
        differences=[
            difference(f"{LABELS[a]} → {LABELS[b]}", found[a], found[b], rules(settings), resampling) for a, b in PAIRS
        ],
        curve=curve,
        examples=_examples(found["trained guided"].dialogues, section.examples),
        facts={
            "prompts": len(asked),
            "level": section.confidence,
            "seconds": round(time.monotonic() - begin, 1),
            "settings": settings.model_dump(
                mode="json", include={"seed", "model", "data", "sft", "refinement", "generation"}
            ),
        },
    )
    page = write_page(result, settings.output_dir)
    return page, {a.name: _headline(a) for a in measured}


def _folder(settings: Settings, who: str, size: int) -> Path:
    return Path(settings.output_dir) / "refinement" / f"{who}-{size}"


def _dialogues(settings: Settings, start: str, count: int) -> list[Dialogue]:
    """Training dialogues of the untrained student, which answers blind: it cannot use feedback yet."""

    def work(folder: Path) -> dict[str, Any]:
        asked, replies = cases(settings, "train", count), Replies(start, settings)
        torch.manual_seed(settings.seed)
        made = run_dialogues(replies, oracle_teacher(settings), asked, replies.form, rules(settings), "blind")
        write_dialogues(made, folder)
        return {"dialogues": len(made), "turns": sum(len(d.turns) for d in made)}

    run_stage("refinement/dialogues", settings, ["refinement", "generation"], work, start=start, count=count)
    return load_dialogues(_source(settings), check_images=False)[0]


def _source(settings: Settings) -> Path:
    return Path(settings.output_dir) / "refinement" / "dialogues"


def _trained(settings: Settings, dialogues: Sequence[Dialogue], start: str, size: int) -> dict[str, Any]:
    """{"student": ..., "teacher": ...}: what training on so many dialogues measured."""
    found = {}
    for who in ("student", "teacher"):
        plain(f"{who}, {size} dialogues")

        def work(folder: Path, who: Any = who) -> dict[str, Any]:
            return fit(who, settings, dialogues, start, folder)

        name = f"refinement/{who}-{size}"
        found[who] = run_stage(
            name, settings, ["sft", "refinement", "generation"], work, start=start, dialogues=_source(settings)
        )
    return found


def _point(size: int, guided: Judged, baseline: Judged, trained: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A point of the curve: the guided student's figures on the evaluation prompts, the teacher's on held-out ones."""
    found: Arm = arm(str(size), "", guided, baseline, rules(settings), Resampling(draws=500, seed=settings.seed))
    last = {kind: asdict(values[-1]) for kind, values in found.by_turn.items()}
    teacher = (trained.get("teacher") or {}).get("teacher") or {}
    return {"training_dialogues": size, **asdict(found.figures), "last": last, "teacher": teacher}


def _examples(dialogues: Sequence[Dialogue], count: int) -> list[Dialogue]:
    """The first dialogues of several turns: half that ended higher than they began, half that did not."""
    several = [d for d in dialogues if len(d.turns) > 1]
    rose = [d for d in several if d.scores[-1] > d.scores[0]]
    fell = [d for d in several if d.scores[-1] <= d.scores[0]]
    return rose[: count - count // 2] + fell[: count // 2]


def _headline(found: Arm) -> dict[str, Any]:
    last = {kind: values[-1].value for kind, values in found.by_turn.items()}
    return {name: json.loads(json.dumps(value)) for name, value in last.items()} | {"turns": found.attempts}
