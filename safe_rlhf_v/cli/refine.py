"""Commands of feedback refinement."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safe_rlhf_v.cli.common import Config, Overrides, plain, settings_of, show
from safe_rlhf_v.command_line import App

app = App(
    no_args_is_help=True,
    short_help="Student-teacher dialogues: make them, train on them, measure them.",
    help="""Feedback refinement (FIRE): a student answers, a teacher that knows the truth scores and gives feedback, the
student answers again.""",
)
train_app = App(no_args_is_help=True, help="Train a student or a teacher on stored dialogues.")
app.add_typer(train_app, name="train")

Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Setting: section.key=value.")]
Folder = Annotated[Path, typer.Option("--dialogues", "-d", help="Folder that `refine dialogues` wrote.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Throw away what was trained before, and start again.")]


class Mode(StrEnum):
    """What the student sees of the turns before."""

    guided = "guided"
    blind = "blind"
    neutral = "neutral"


class SplitName(StrEnum):
    """A split of the data."""

    train = "train"
    evaluation = "evaluation"


@app.command()
def dialogues(
    out: Annotated[Path, typer.Argument(help="Folder to write to: dialogues.jsonl and pictures.")],
    student: Annotated[str, typer.Option(help="Folder or hub id of the model that answers.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of a model, or oracle (picture world).")] = "oracle",
    mode: Annotated[
        Mode, typer.Option(help="guided: the student sees the feedback; blind: the question; neutral: empty feedback.")
    ] = Mode.guided,
    split: Annotated[SplitName, typer.Option(help="Split whose questions are asked.")] = SplitName.train,
    count: Annotated[int | None, typer.Option(min=1, help="Dialogues; more than questions ask some again.")] = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Let a student and a teacher talk about a data set's questions.

    Example: safe-rlhf-v refine dialogues runs/d --student runs/quickstart/sft -s data.path=runs/quickstart/data
    """
    from safe_rlhf_v.stages.refine import Refining

    found = Refining(settings_of(config, set_)).make(out, student, teacher, mode.value, split.value, count)
    show("dialogues", found)
    plain(f"written: {out}")
    _next("refine", "train", "student", "--dialogues", out, *_settings(config, set_))


@train_app.command("student")
def train_student(
    dialogues: Folder, config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Train the start model on answers that improved, given question, answers before and feedback.

    Example: safe-rlhf-v refine train student --dialogues runs/d --config run.yaml refinement.first_turns=all
    """
    _train("student", dialogues, config, overrides, overwrite)


@train_app.command("teacher")
def train_teacher(
    dialogues: Folder, config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Train the start model on scores and feedback, and measure it on held-out dialogues.

    Example: safe-rlhf-v refine train teacher --dialogues runs/d --config run.yaml
    """
    _train("teacher", dialogues, config, overrides, overwrite)


def _train(who: str, folder: Path, config: Config, overrides: Overrides, overwrite: bool) -> None:
    from safe_rlhf_v.stages.refine import Refining

    settings = settings_of(config, overrides)
    show(who, Refining(settings).train(who, folder, overwrite=overwrite))  # type: ignore[arg-type]
    trained = f"{settings.output_dir}/{who}"
    plain(f"written: {trained}")
    _next("refine", "evaluate", folder, f"--{who}", trained, *_settings(config, overrides, flag=True))


def _settings(config: Path | None, given: list[str] | None, *, flag: bool = False) -> list[str | Path]:
    """The same settings for the next command, which takes them with --set where flag is true."""
    again = [x for setting in given or [] for x in (["--set", setting] if flag else [setting])]
    where: list[str | Path] = ["--config", config] if config else []
    return [*where, *again]


def _next(*words: str | Path) -> None:
    plain(f"next: {shlex.join(['safe-rlhf-v', *map(str, words)])}")


@app.command()
def evaluate(
    dialogues: Annotated[Path, typer.Argument(help="Folder of dialogues.")],
    baseline: Annotated[
        Path | None, typer.Option(help="Dialogues of a baseline on the same questions, for AT.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Measure this student against the dialogues as given.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Measure this teacher against the dialogues as given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all figures to this .json.")] = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Turns, refinement and accuracy of free dialogues; or a student or teacher against fixed ones.

    Example: safe-rlhf-v refine evaluate runs/trained --baseline runs/blind --output figures.json

    Example: safe-rlhf-v refine evaluate runs/d --teacher runs/demo/teacher
    """
    from safe_rlhf_v.stages.folder import write_json
    from safe_rlhf_v.stages.refine import Refining, free_figures, read

    settings, given = settings_of(config, set_), read(dialogues)
    if student or teacher:
        found = Refining(settings).fixed_figures(given, student, teacher)
    else:
        found = free_figures(given, None if baseline is None else read(baseline), settings.refinement.correct)
    for name, values in found.items() if student or teacher else [("free dialogues", found)]:
        show(name, values)
    if output is not None:
        write_json(output, found)
        plain(f"written: {output}")
    if student or teacher:
        talker = ["--student", student or "STUDENT", *(["--teacher", teacher] if teacher else [])]
        _next("refine", "dialogues", "FOLDER", *talker, *_settings(config, set_, flag=True))
    else:
        _next("refine", "train", "student", "--dialogues", dialogues, *_settings(config, set_))


@app.command()
def compare(
    config: Config = None,
    overrides: Overrides = None,
    size: Annotated[
        list[int] | None, typer.Option(min=50, help="Training dialogues; may be given more than once.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Blind regeneration, guided regeneration and trained students, by turn and by number of training dialogues.

    On the picture world, from the start model and guard of output_dir; writes refinement.html and refinement.json.

    Example: safe-rlhf-v refine compare --config run.yaml --size 500 --size 2000
    """
    from safe_rlhf_v.stages.refine_compare import compare as run

    settings = settings_of(config, overrides)
    page, headline = run(settings, sorted(set(size or [500, 2000, 8000])), overwrite=overwrite)
    show("after the last turn", headline)
    plain(f"report: {page}")
