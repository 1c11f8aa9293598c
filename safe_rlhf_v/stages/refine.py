"""Feedback refinement with the models and data of a run: make dialogues, train on them, measure them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from beavertails_v import Prompt
from beavertails_v.dialogues import FILE, Dialogue, load_dialogues, write_dialogues
from guard.classifier import Guard
from guard.model import control_tokens
from guard.text import Neutraliser
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.models.processing import EncodingError
from safe_rlhf_v.refinement.fixed import student_against, teacher_against
from safe_rlhf_v.refinement.formats import Format, format_for
from safe_rlhf_v.refinement.metrics import accuracy_by_turn, refinement, refinement_intervals
from safe_rlhf_v.refinement.model_teacher import ModelTeacher
from safe_rlhf_v.refinement.oracle_teacher import OracleTeacher, ground_truth
from safe_rlhf_v.refinement.protocol import Case, Mode, Rules, Teacher, run_dialogues
from safe_rlhf_v.refinement.rows import split_by_prompt, student_rows, teacher_rows
from safe_rlhf_v.refinement.vocabulary import format_of, teacher_words, with_words
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.answering import Answering
from safe_rlhf_v.stages.folder import run_stage
from safe_rlhf_v.training.card import write_card
from safe_rlhf_v.training.encode import check_prompt
from safe_rlhf_v.training.supervised import train_sft

Who = Literal["student", "teacher"]
NOTHING = {
    "student": "no answer scored higher than the one before it, and refinement.first_turns takes no first one",
    "teacher": "no turn has a score and feedback that was shown",
}


class Replies:
    """A model that replies to prompts; what it says can neither add a picture nor forge a turn when it is quoted.

    What the model cannot read, such as a dialogue grown past model.max_prompt_length, gets an empty reply, and is
    printed. `form`: how the model is spoken to. greedy: the likeliest reply, always the same.
    """

    def __init__(self, path: str | Path, settings: Settings, *, greedy: bool = False) -> None:
        self.model = Answering(path, settings)
        self.form: Format = format_for(self.model.encoder.tokenizer)
        self.harmless = Neutraliser(control_tokens(self.model.encoder))
        if greedy:
            self.model.sampling = replace(self.model.sampling, temperature=0.0)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        fits = [self._fits(prompt) for prompt in prompts]
        replies = iter(self.model([p for p, fit in zip(prompts, fits, strict=True) if fit]))
        return [self.harmless(next(replies)) if fit else "" for fit in fits]

    def _fits(self, prompt: Prompt) -> bool:
        try:
            check_prompt(prompt, self.model.encoder)
        except EncodingError as error:
            plain(f"no reply: {error}")
            return False
        return True


def rules(settings: Settings) -> Rules:
    section = settings.refinement
    return Rules(correct=section.correct, max_turns=section.max_turns, leak_share=section.leak_share)


def cases(settings: Settings, split: build.Split, count: int | None = None) -> list[Case]:
    """Questions with true answers: the world's own, or the response that sft.responses picks (of "all" the safer).

    Shuffled by the seed: data sets stand in order of category, and the first few would be of one alone.
    count: as many cases, going round the questions again where there are fewer; None takes each once.
    """
    data = build.comparisons(settings, split)
    pick = "safer" if settings.sft.responses == "all" else settings.sft.responses
    found: dict[str, Case] = {}
    for pair in data:
        known = "picture_world" in pair.prompt.meta
        truth = ground_truth(pair.prompt) if known else pair.responses[getattr(pair, pick)].text
        found.setdefault(pair.prompt.id, Case(prompt=pair.prompt, truth=truth))
    once = random.Random(settings.seed).sample(list(found.values()), len(found))
    return once if count is None else [once[i % len(once)] for i in range(count)]


def oracle_teacher(settings: Settings) -> OracleTeacher:
    """The oracle with safety by settings.refinement.safety."""
    safety = settings.refinement.safety
    if safety != "guard":
        return OracleTeacher(safety)
    judge = Guard.from_pretrained(
        build.trained(settings, "guard", settings.guard.path, "guard.path"),
        policy=settings.guard.policy,
        device=build.device(),
        dtype=settings.model.dtype,
    )
    return OracleTeacher(lambda prompts, texts: [v.flagged * int(v.severity) for v in judge.judge(prompts, texts)])


def teacher_of(name: str, settings: Settings, prompts: Sequence[Prompt]) -> Teacher:
    """ "oracle", for picture-world prompts, or the folder of a model."""
    if name != "oracle":
        replies = Replies(name, settings, greedy=True)
        return ModelTeacher(replies, replies.form)
    if not all("picture_world" in prompt.meta for prompt in prompts):
        raise SettingsError("--teacher oracle knows the picture world alone; give the folder or hub id of a model")
    return oracle_teacher(settings)


def make(
    settings: Settings, folder: Path, student: str, teacher: str, mode: Mode, split: build.Split, count: int | None
) -> dict[str, Any]:
    """Free dialogues of two models (or a model and the oracle), written to a folder; returns their figures."""
    asked = cases(settings, split, count)
    replies = Replies(student, settings)
    torch.manual_seed(settings.seed)
    made = run_dialogues(
        replies, teacher_of(teacher, settings, [c.prompt for c in asked]), asked, replies.form, rules(settings), mode
    )
    write_dialogues(made, folder)
    return free_figures(made, None, settings)


def read(folder: str | Path) -> list[Dialogue]:
    """Dialogues of a folder; rows left out are shown."""
    found, report = load_dialogues(folder)
    plain(report.summary())
    return found


def free_figures(
    dialogues: Sequence[Dialogue], baseline: Sequence[Dialogue] | None, settings: Settings
) -> dict[str, Any]:
    """FIRE's figures, leaks, and accuracy by turn with intervals."""
    scores = [d.scores for d in dialogues]
    before = None if baseline is None else [d.scores for d in baseline]
    correct, most = settings.refinement.correct, max(map(len, scores))
    prompts = [d.prompt.id for d in dialogues]
    by_turn = accuracy_by_turn(scores, prompts, most, correct)
    turns = [turn for d in dialogues for turn in d.turns]
    return {
        **asdict(refinement(scores, before, correct)),
        "leak_rate": sum(turn.withheld is not None for turn in turns) / len(turns),
        "accuracy_by_turn": [asdict(x) for x in by_turn],
        "intervals": {k: asdict(x) for k, x in refinement_intervals(scores, prompts, correct).items()},
    }


def fixed_figures(
    dialogues: Sequence[Dialogue], settings: Settings, student: str | None, teacher: str | None
) -> dict[str, Any]:
    """A student's and a teacher's figures against given dialogues."""
    found: dict[str, Any] = {}
    if student:
        replies = Replies(student, settings, greedy=True)
        found["student"] = student_against(dialogues, replies, replies.form)
    if teacher:
        judge = teacher_of(teacher, settings, [d.prompt for d in dialogues])
        section = settings.refinement
        found["teacher"] = teacher_against(dialogues, judge, section.correct, section.leak_share)
    return found


def train(who: Who, settings: Settings, folder: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune the start model as student or teacher on stored dialogues; writes <output_dir>/<who>.

    A teacher whose tokenizer lacks the words of scores gets them first, in <output_dir>/<who>/base.
    """
    base = build.start_model(settings)
    file = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    dialogues = read(file)

    def work(target: Path) -> dict[str, Any]:
        return fit(who, settings, dialogues, base, target)

    content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return run_stage(
        who, settings, ["sft", "refinement"], work, overwrite=overwrite, start=base, dialogues=f"{file} {content}"
    )


def _require(who: Who, parts: Sequence[Sequence[Dialogue]], *rows: Sequence[Any]) -> None:
    """What could not be trained on or measured is said before training. Raises SettingsError."""
    for part, found, name in zip(parts, rows, ("train on", "measure on"), strict=True):
        if not found:
            raise SettingsError(f"{len(part)} dialogues hold nothing to {name}: {NOTHING[who]}; make more dialogues")
    if who == "student" and all(len(d.turns) == 1 for d in parts[1]):
        raise SettingsError(
            f"none of the {len(parts[1])} held-out dialogues has a second answer to measure the student on; make more "
            "dialogues, or raise refinement.held_out"
        )


def fit(who: Who, settings: Settings, dialogues: Sequence[Dialogue], base: str, target: Path) -> dict[str, Any]:
    """Train on all but the held-out prompts' dialogues; measured: as train_sft, and the fixed setting held out."""
    section = settings.refinement
    parts = split_by_prompt(dialogues, section.held_out)
    if not all(parts):
        raise SettingsError(f"{len(dialogues)} dialogues are too few to hold out {section.held_out:g} of their prompts")
    form = format_of(base)
    if who == "student":
        train_rows, held = (student_rows(part, form, section.first_turns, section.correct) for part in parts)
    else:
        base = with_words(base, teacher_words(form), target / "base")
        train_rows, held = (teacher_rows(part, form) for part in parts)
    _require(who, parts, train_rows, held)
    measured = train_sft(train_rows, held, base, target, settings)
    torch.manual_seed(settings.seed)
    given = (str(target), None) if who == "student" else (None, str(target))
    measured |= {"dialogues": len(parts[0]), **fixed_figures(parts[1], settings, *given)}
    write_card(target, who, base, settings, measured)
    return measured
