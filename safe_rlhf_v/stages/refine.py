"""Feedback refinement with the models and data of a run: make dialogues, train on them, measure them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from beavertails_v import Prompt
from beavertails_v.dialogues import FILE, Dialogue, load_dialogues, write_dialogues
from guard.classifier import Guard
from guard.model import control_tokens
from guard.text import Neutraliser
from safe_rlhf_v.config import GenerationSection, ModelSection, Settings, SettingsError
from safe_rlhf_v.console import plain
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
from safe_rlhf_v.stages.card import Card
from safe_rlhf_v.stages.data import Split, comparisons
from safe_rlhf_v.stages.folder import StageResult, run_stage
from safe_rlhf_v.stages.models import device, start_model, trained
from safe_rlhf_v.training.encode import check_prompt
from safe_rlhf_v.training.supervised import train_sft
from safe_rlhf_v.vlm.processing import EncodingError

Who = Literal["student", "teacher"]
SECTIONS = ("sft", "refinement")
CARDS = {
    "student": Card(
        kind="student",
        purpose="Answers questions about pictures, and answers again when given feedback on its answer.",
        limits="It imitates answers that improved, not answers that are right, and first answers as the settings say.",
    ),
    "teacher": Card(
        kind="teacher",
        purpose="Scores answers to questions about pictures, 1 to 10, given the true answer, and writes feedback.",
        limits="Its scores and feedback are as good as those it imitates; it needs the true answer.",
    ),
}
NOTHING = {
    "student": "no answer scored higher than the one before it, and refinement.first_turns takes no first one",
    "teacher": "no turn has a score and feedback that was shown",
}


class Replies:
    """A model that replies to prompts; what it says can neither add a picture nor forge a turn when it is quoted.

    What the model cannot read, such as a dialogue grown past model.max_prompt_length, gets an empty reply, and is
    printed. `form`: how the model is spoken to. greedy: the likeliest reply, always the same.
    """

    def __init__(
        self, path: str | Path, model: ModelSection, generation: GenerationSection, *, greedy: bool = False
    ) -> None:
        self.model = Answering(path, model, generation)
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


@dataclass(frozen=True, slots=True)
class Refining:
    """Feedback refinement with the models and data of one run's settings."""

    settings: Settings

    @property
    def rules(self) -> Rules:
        return self.settings.refinement.made()  # type: ignore[no-any-return]

    def replies(self, path: str | Path, *, greedy: bool = False) -> Replies:
        return Replies(path, self.settings.model, self.settings.generation, greedy=greedy)

    def cases(self, split: Split, count: int | None = None) -> list[Case]:
        """Questions with true answers: the world's own, or the response that sft.responses picks (of "all" the safer).

        Shuffled by the seed: data sets stand in order of category, and the first few would be of one alone.
        count: as many cases, going round the questions again where there are fewer; None takes each once.
        """
        pick = "safer" if self.settings.sft.responses == "all" else self.settings.sft.responses
        found: dict[str, Case] = {}
        for pair in comparisons(self.settings.data, split):
            known = "picture_world" in pair.prompt.meta
            truth = ground_truth(pair.prompt) if known else pair.responses[getattr(pair, pick)].text
            found.setdefault(pair.prompt.id, Case(prompt=pair.prompt, truth=truth))
        once = random.Random(self.settings.seed).sample(list(found.values()), len(found))
        return once if count is None else [once[i % len(once)] for i in range(count)]

    def oracle(self, safety: Literal["oracle", "guard", "none"] | None = None) -> OracleTeacher:
        """The oracle, told what is unsafe by `safety`, else as refinement.safety says."""
        safety = safety or self.settings.refinement.safety
        if safety != "guard":
            return OracleTeacher(safety)
        judge = Guard.from_pretrained(
            trained(self.settings.output_dir, "guard", self.settings.guard.path, "guard.path"),
            policy=self.settings.guard.policy,
            device=device(),
            dtype=self.settings.model.dtype,
        )
        return OracleTeacher(lambda prompts, texts: [v.flagged * int(v.severity) for v in judge.judge(prompts, texts)])

    def teacher(self, name: str, prompts: Sequence[Prompt]) -> Teacher:
        """ "oracle", for picture-world prompts, or the folder of a model."""
        if name != "oracle":
            replies = self.replies(name, greedy=True)
            return ModelTeacher(replies, replies.form)
        if not all("picture_world" in prompt.meta for prompt in prompts):
            raise SettingsError("--teacher oracle knows the picture world alone; give the folder or hub id of a model")
        return self.oracle()

    def make(
        self, folder: Path, student: str, teacher: str, mode: Mode, split: Split, count: int | None
    ) -> dict[str, Any]:
        """Free dialogues of two models (or a model and the oracle), written to a folder; returns their figures."""
        asked = self.cases(split, count)
        replies = self.replies(student)
        torch.manual_seed(self.settings.seed)
        taught_by, how = self.teacher(teacher, [c.prompt for c in asked]), self.rules
        made = run_dialogues(replies, taught_by, asked, replies.form, how, mode)
        write_dialogues(made, folder)
        return free_figures(made, None, self.settings.refinement.correct)

    def fixed_figures(self, dialogues: Sequence[Dialogue], student: str | None, teacher: str | None) -> dict[str, Any]:
        """A student's and a teacher's figures against given dialogues."""
        found: dict[str, Any] = {}
        if student:
            replies = self.replies(student, greedy=True)
            found["student"] = student_against(dialogues, replies, replies.form)
        if teacher:
            judge = self.teacher(teacher, [d.prompt for d in dialogues])
            section = self.settings.refinement
            found["teacher"] = teacher_against(dialogues, judge, section.correct, section.leak_share)
        return found

    def train(self, who: Who, folder: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Fine-tune the start model as student or teacher on stored dialogues; writes <output_dir>/<who>.

        A teacher whose tokenizer lacks the words of scores gets them first, in <output_dir>/<who>/base.
        """
        base = start_model(self.settings.model, self.settings.output_dir)
        file = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
        dialogues = read(file)

        def work(target: Path) -> StageResult:
            return self.fit(who, dialogues, base, target)

        content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        inputs = {"start": base, "dialogues": f"{file} {content}"}
        return run_stage(who, self.settings, SECTIONS, work, card=CARDS[who], overwrite=overwrite, **inputs)

    def fit(self, who: Who, dialogues: Sequence[Dialogue], base: str, target: Path) -> StageResult:
        """Train on all but the held-out prompts' dialogues; measured: as train_sft, and the fixed setting held out."""
        section = self.settings.refinement
        parts = split_by_prompt(dialogues, section.held_out)
        if not all(parts):
            raise SettingsError(
                f"{len(dialogues)} dialogues are too few to hold out {section.held_out:g} of their prompts"
            )
        form = format_of(base)
        if who == "student":
            train_rows, held = (student_rows(part, form, section.first_turns, section.correct) for part in parts)
        else:
            base = with_words(base, teacher_words(form), target / "base")
            train_rows, held = (teacher_rows(part, form) for part in parts)
        _require(who, parts, train_rows, held)
        measured = train_sft(train_rows, held, base, target, self.settings.sft, build.setup(self.settings))
        torch.manual_seed(self.settings.seed)
        given = (str(target), None) if who == "student" else (None, str(target))
        measured |= {"dialogues": len(parts[0]), **self.fixed_figures(parts[1], *given)}
        return StageResult(measured=measured, base=base)


def read(folder: str | Path) -> list[Dialogue]:
    """Dialogues of a folder; rows left out are shown."""
    found, report = load_dialogues(folder)
    plain(report.summary())
    return found


def free_figures(dialogues: Sequence[Dialogue], baseline: Sequence[Dialogue] | None, correct: int) -> dict[str, Any]:
    """FIRE's figures, leaks, and accuracy by turn with intervals."""
    scores = [d.scores for d in dialogues]
    before = None if baseline is None else [d.scores for d in baseline]
    most = max(map(len, scores))
    prompts = [d.prompt.id for d in dialogues]
    by_turn = accuracy_by_turn(scores, prompts, most, correct)
    turns = [turn for d in dialogues for turn in d.turns]
    return {
        **asdict(refinement(scores, before, correct)),
        "leak_rate": sum(turn.withheld is not None for turn in turns) / len(turns),
        "accuracy_by_turn": [asdict(x) for x in by_turn],
        "intervals": {k: asdict(x) for k, x in refinement_intervals(scores, prompts, correct).items()},
    }


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
