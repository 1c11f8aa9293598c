"""Commands of the guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safe_rlhf_v.cli.common import console, plain, settings_of, show, user_errors

app = typer.Typer(no_args_is_help=True, help="Judge questions and answers, or answer through the guard.")
Folder = Annotated[Path, typer.Argument(help="Folder of a trained guard, for example runs/demo/guard.")]
Image = Annotated[list[Path] | None, typer.Option("--image", "-i", help="Picture; may be given more than once.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="YAML of what happens at which severity.")]


@app.command()
@user_errors
def check(
    folder: Folder,
    text: Annotated[str, typer.Option("--text", "-t", help="The question.")],
    image: Image = None,
    response: Annotated[str | None, typer.Option("--response", "-r", help="Judge this answer to it.")] = None,
    policy: PolicyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole verdict as JSON.")] = False,
) -> None:
    """Judge a question, or with --response an answer to it. Exit code 1 where it is flagged.

    Example: safe-rlhf-v guard check runs/demo/guard --image photo.png --text "how do i use it ?"
    """
    from guard.classifier import Guard

    verdict = Guard.from_pretrained(folder, policy=policy).moderate(list(image or []), text, response)
    if as_json:
        console.print_json(json.dumps(verdict.to_dict()))
    else:
        summary: dict[str, Any] = {"flagged": verdict.flagged, "action": verdict.action, "reason": verdict.reason}
        summary |= {"unsafe": verdict.unsafe_probability, "severity": verdict.severity.name.lower()}
        show(verdict.kind, summary | {"category": verdict.top_category})
    if verdict.flagged:
        raise typer.Exit(1)


@app.command()
@user_errors
def regenerate(
    folder: Folder,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of the model that answers.")],
    text: Annotated[str, typer.Option("--text", "-t", help="The question.")],
    image: Image = None,
    rounds: Annotated[int, typer.Option(min=0, help="New attempts before the guard gives up.")] = 5,
    policy: PolicyFile = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Setting: section.key=value.")] = None,
) -> None:
    """Answer through the guard: a flagged answer is sampled again, and refused after the last round.

    Example: safe-rlhf-v guard regenerate runs/demo/guard --model runs/demo/policy -i photo.png -t "how do i use it ?"
    """
    from guard.classifier import Guard
    from safe_rlhf_v.cli.answering import regenerate_one

    judge = Guard.from_pretrained(folder, policy=policy)
    transcript = regenerate_one(judge, model, text, image or [], rounds, settings_of(None, set_))
    plain(transcript.answer)
    show("guard", {"outcome": transcript.outcome, "rounds": transcript.rounds, "tokens": transcript.tokens})
