"""The experiment of feedback refinement on the picture world: does feedback help, after how much training?"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from beavertails_v.dialogues import Dialogue, load_dialogues, write_dialogues
from safe_rlhf_v.config import EvaluationSection, Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.refinement.comparison import Arm, Comparison, Judged, arm, difference, judged
from safe_rlhf_v.refinement.model_teacher import ModelTeacher
from safe_rlhf_v.refinement.oracle_teacher import OracleTeacher
from safe_rlhf_v.refinement.protocol import Mode, Rules, Teacher, run_dialogues
from safe_rlhf_v.refinement.report import write_page
from safe_rlhf_v.stages.folder import StageResult, run_stage
from safe_rlhf_v.stages.models import start_model
from safe_rlhf_v.stages.refine import CARDS, SECTIONS, Refining, Replies
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
    start, begin, run = start_model(settings.model, settings.output_dir), time.monotonic(), Refining(settings)
    below, how = Path(settings.output_dir) / "refinement", run.rules
    if overwrite:
        shutil.rmtree(below, ignore_errors=True)
    asked = run.cases("evaluation")
    if not all("picture_world" in case.prompt.meta for case in asked):
        raise SettingsError(
            f"data.path {settings.data.path}: the comparison needs the picture world, whose truth is known"
        )
    guarded = run.oracle("guard")
    training = _dialogues(run, start, max(sizes))
    trained = {size: _trained(run, training[:size], start, size) for size in sizes}

    def talk(replies: Replies, teacher: Teacher, mode: Mode) -> Judged:
        torch.manual_seed(settings.seed)
        return judged(run_dialogues(replies, teacher, asked, replies.form, how, mode), how)

    student = run.replies(below / f"student-{sizes[-1]}")
    teacher = run.replies(below / f"teacher-{sizes[-1]}", greedy=True)
    found = {name: talk(*one) for name, one in _arms(run.replies(start), student, teacher, guarded).items()}
    oracle = OracleTeacher("oracle")
    students = {size: talk(run.replies(below / f"student-{size}"), oracle, "guided") for size in sizes[:-1]}
    students |= {sizes[-1]: found["trained guided"]}
    kept = {"seed", "model", "data", "sft", "refinement", "generation"}
    result = _result(
        found,
        _curve(found, students, trained, how, settings.seed),
        how,
        settings.evaluation,
        settings.seed,
        facts={
            "prompts": len(asked),
            "level": settings.evaluation.confidence,
            "seconds": round(time.monotonic() - begin, 1),
            "settings": settings.model_dump(mode="json", include=kept),
        },
    )
    return write_page(result, settings.output_dir), {a.name: _headline(a) for a in result.arms}


def _arms(
    base: Replies, student: Replies, teacher: Replies, guarded: OracleTeacher
) -> dict[str, tuple[Replies, Teacher, Mode]]:
    """Who answers, who teaches, and what the student sees."""
    oracle = OracleTeacher("oracle")
    return {
        "base blind": (base, oracle, "blind"),
        "base guided": (base, oracle, "guided"),
        "trained blind": (student, oracle, "blind"),
        "trained neutral": (student, oracle, "neutral"),
        "trained guided": (student, oracle, "guided"),
        "trained by teacher": (student, ModelTeacher(teacher, teacher.form), "guided"),
        "base blind by guard": (base, guarded, "blind"),
        "base guided by guard": (base, guarded, "guided"),
        "trained by guard": (student, guarded, "guided"),
    }


def _result(
    found: Mapping[str, Judged],
    curve: list[dict[str, Any]],
    how: Rules,
    section: EvaluationSection,
    seed: int,
    facts: dict[str, Any],
) -> Comparison:
    resampling = Resampling(level=section.confidence, draws=section.bootstrap, seed=seed)
    return Comparison(
        arms=[arm(n, LABELS[n], j, found["base blind"], how, resampling) for n, j in found.items()],
        differences=[difference(f"{LABELS[a]} → {LABELS[b]}", found[a], found[b], how, resampling) for a, b in PAIRS],
        curve=curve,
        examples=_examples(found["trained guided"].dialogues, section.examples),
        facts=facts,
    )


def _dialogues(run: Refining, start: str, count: int) -> list[Dialogue]:
    """Training dialogues of the untrained student, which answers blind: it cannot use feedback yet."""

    def work(folder: Path) -> dict[str, Any]:
        asked, replies = run.cases("train", count), run.replies(start)
        torch.manual_seed(run.settings.seed)
        made = run_dialogues(replies, run.oracle(), asked, replies.form, run.rules, "blind")
        write_dialogues(made, folder)
        return {"dialogues": len(made), "turns": sum(len(d.turns) for d in made)}

    run_stage("refinement/dialogues", run.settings, ["refinement", "generation"], work, start=start, count=count)
    return load_dialogues(_source(run.settings.output_dir), check_images=False)[0]


def _source(output_dir: str) -> Path:
    return Path(output_dir) / "refinement" / "dialogues"


def _trained(run: Refining, dialogues: Sequence[Dialogue], start: str, size: int) -> dict[str, Any]:
    """{"student": ..., "teacher": ...}: what training on so many dialogues measured."""
    found = {}
    for who in CARDS:
        plain(f"{who}, {size} dialogues")

        def work(folder: Path, who: Any = who) -> StageResult:
            return run.fit(who, dialogues, start, folder)

        name = f"refinement/{who}-{size}"
        inputs: dict[str, Any] = {"start": start, "dialogues": _source(run.settings.output_dir)}
        found[who] = run_stage(name, run.settings, [*SECTIONS, "generation"], work, card=CARDS[who], **inputs)
    return found


def _curve(
    found: Mapping[str, Judged],
    students: Mapping[int, Judged],
    trained: Mapping[int, dict[str, Any]],
    how: Rules,
    seed: int,
) -> list[dict[str, Any]]:
    """A point a size: the guided student's figures on the evaluation prompts, the teacher's on held-out ones."""
    points = []
    for size, guided in {0: found["base guided"], **students}.items():
        of: Arm = arm(str(size), "", guided, found["base blind"], how, Resampling(draws=500, seed=seed))
        last = {kind: asdict(values[-1]) for kind, values in of.by_turn.items()}
        teacher = (trained.get(size, {}).get("teacher") or {}).get("teacher") or {}
        points.append({"training_dialogues": size, **asdict(of.figures), "last": last, "teacher": teacher})
    return points


def _examples(dialogues: Sequence[Dialogue], count: int) -> list[Dialogue]:
    """The first dialogues of several turns: half that ended higher than they began, half that did not."""
    several = [d for d in dialogues if len(d.turns) > 1]
    rose = [d for d in several if d.scores[-1] > d.scores[0]]
    fell = [d for d in several if d.scores[-1] <= d.scores[0]]
    return rose[: count - count // 2] + fell[: count // 2]


def _headline(found: Arm) -> dict[str, Any]:
    last = {kind: values[-1].value for kind, values in found.by_turn.items()}
    return {name: json.loads(json.dumps(value)) for name, value in last.items()} | {"turns": found.attempts}
