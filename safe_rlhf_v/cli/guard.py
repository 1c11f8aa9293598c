"""Commands of the guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safe_rlhf_v.cli.common import plain, settings_of, show
from safe_rlhf_v.command_line import App

app = App(no_args_is_help=True, help="Judge questions and answers, or answer through the guard.")
Folder = Annotated[Path, typer.Argument(help="Folder of a trained guard, for example runs/quickstart/guard.")]
Image = Annotated[list[str] | None, typer.Option("--image", "-i", help="Picture; may be given more than once.")]
Question = Annotated[str | None, typer.Option("--prompt", "-p", help="The question. Required.", show_default=False)]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="YAML of what is done at which severity; else the guard's own.")
]


def _question(prompt: str | None) -> str:
    """Raises SettingsError where there is none, ContentError where it is not UTF-8 text."""
    from guard.items import text_of
    from safe_rlhf_v.config_io import SettingsError

    if prompt is None:
        raise SettingsError("give --prompt, the question")
    return text_of(prompt, "prompt")


@app.command()
def check(
    folder: Folder,
    prompt: Question = None,
    image: Image = None,
    response: Annotated[str | None, typer.Option("--response", "-r", help="Judge this answer to it.")] = None,
    policy: PolicyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole verdict as JSON.")] = False,
) -> None:
    """Judge a question, or with --response an answer to it. Exit code 1 where it is flagged.

    Example: safe-rlhf-v guard check runs/quickstart/guard --image photo.png --prompt "how do i use it ?"
    """
    from guard.classifier import Guard

    question = _question(prompt)
    verdict = Guard.from_pretrained(folder, policy=policy).moderate(list(image or []), question, response)
    if as_json:
        plain(json.dumps(verdict.to_dict(), indent=2))
    else:
        summary: dict[str, Any] = {"flagged": verdict.flagged, "action": verdict.action, "reason": verdict.reason}
        summary |= {"unsafe": verdict.unsafe_probability, "severity": verdict.severity.name.lower()}
        show(verdict.kind, summary | {"category": verdict.top_category})
    if verdict.flagged:
        raise typer.Exit(1)


@app.command()
def regenerate(
    folder: Folder,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of the model that answers.")],
    prompt: Question = None,
    image: Image = None,
    rounds: Annotated[int, typer.Option(min=0, help="New attempts before the guard gives up.")] = 5,
    policy: PolicyFile = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Setting, such as generation.temperature=0.7.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole transcript as JSON.")] = False,
) -> None:
    """Answer through the guard: a flagged answer is sampled again, and refused after the last round.

    Example: safe-rlhf-v guard regenerate runs/quickstart/guard -m runs/quickstart/policy -i a.png -p "what is this ?"
    """
    from guard.classifier import Guard
    from safe_rlhf_v.stages.answering import one_prompt, regenerate_one, show_attempts

    question = _question(prompt)
    judge, settings = Guard.from_pretrained(folder, policy=policy), settings_of(None, set_)
    speech = (settings.model, settings.generation, settings.seed)
    transcript = regenerate_one(judge, model, one_prompt(question, image or []), rounds, *speech)
    if as_json:
        plain(json.dumps(transcript.to_dict(), indent=2))
        return
    plain(transcript.answer)
    show("guard", {"outcome": transcript.outcome, "rounds": transcript.rounds, "tokens": transcript.tokens})
    show_attempts(transcript)


@app.command()
def serve(
    folder: Folder,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one. [default: 8000]")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML of the server's settings.")] = None,
    upstream: Annotated[
        str | None, typer.Option("--upstream", help="OpenAI-shaped API that answers, such as http://127.0.0.1:8001/v1.")
    ] = None,
    upstream_model: Annotated[str | None, typer.Option("--upstream-model", help="Model asked of it.")] = None,
    answering: Annotated[
        Path | None, typer.Option("--policy", help="Folder of a model that answers on this machine instead.")
    ] = None,
    severity_policy: Annotated[
        Path | None, typer.Option("--severity-policy", help="YAML of what is done at which severity; else the guard's.")
    ] = None,
) -> None:
    """Serve the guard over HTTP: moderation in OpenAI's shape, and a guarded proxy before a model that answers.

    Where SAFE_RLHF_V_API_KEYS is set (comma-separated), every route but /healthz wants one of these keys.

    Example: safe-rlhf-v guard serve runs/quickstart/guard --policy runs/quickstart/policy
    """
    try:
        from guard.server.app import application
        from guard.server.run import serve as run
        from guard.server.settings import ServeSettings
    except ModuleNotFoundError as error:
        from safe_rlhf_v.config_io import SettingsError

        raise SettingsError(f"{error.name} is not installed: pip install 'safe-rlhf-v[serve]'") from None
    settings = ServeSettings.load(
        config,
        host=host,
        port=port,
        upstream__url=upstream,
        upstream__model=upstream_model,
        upstream__policy=None if answering is None else str(answering),
    )
    run(application(folder, settings, policy=severity_policy), settings, plain)


@app.command(name="self-test")
def self_test(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option("--data", help="Labelled data: choose the inputs anew from its evaluation split.")
    ] = None,
    policy: PolicyFile = None,
) -> None:
    """Judge the known inputs that are stored with a guard; with --data, store such inputs first.

    Example: safe-rlhf-v guard self-test runs/quickstart/guard
    """
    from beavertails_v import load_responses
    from guard.classifier import Guard
    from guard.golden import self_test as test
    from guard.golden import write_from

    judge = Guard.from_pretrained(folder, policy=policy)
    if data is not None:
        plain(f"{write_from(judge, folder, load_responses(data, 'evaluation'))} inputs stored in {folder}")
    plain(f"{test(judge, folder)} known inputs have their known verdicts")


Data = Annotated[str, typer.Option("--data", help="Labelled data: a folder, one parquet or jsonl file, or a hub id.")]
Split = Annotated[str, typer.Option(help="Split to read.")]
Columns = Annotated[str | None, typer.Option(help="Column map, by name or .yaml file, for other column names.")]
Device = Annotated[str | None, typer.Option(help="Where to judge, such as cuda. [default: the processor]")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")]


@app.command()
def evaluate(
    guards: Annotated[
        list[str], typer.Option("--guards", help="Folders of guards, or generative:MODEL; commas between them.")
    ],
    data: Data,
    split: Split = "evaluation",
    columns: Columns = None,
    benign: Annotated[str | None, typer.Option(help="Data whose questions are all harmless, beside --data.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the page and of evaluation.json.")] = Path(
        "runs/guard_evaluation"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many answers, a fixed sample.")] = None,
    perturbations: Annotated[
        bool, typer.Option("--perturbations", help="Judge under 14 disguises of pictures and texts, too.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Measure guards side by side on labelled data: a page and a JSON.

    Example: safe-rlhf-v guard evaluate --guards runs/quickstart/guard --data runs/quickstart/data
    """
    from beavertails_v import load_responses
    from guard.report import Measuring, guard_names, measure

    names = guard_names(guards)
    rows = load_responses(data, split, columns=columns, limit=limit)
    plain(rows.report.summary())
    harmless = () if benign is None else load_responses(benign, split, columns=columns).prompts()
    how, load = Measuring(perturbations=perturbations), {"device": device, "dtype": dtype}
    report = measure(names, rows, out, benign=harmless, measuring=how, load=load)
    for name, found in report["guards"].items():
        for kind in ("query", "response"):
            show(f"{name}, {kind}", {k: v for k, v in (found[kind] or {}).items() if k != "intervals"})
        show(name, {key: found[key] for key in ("severity_kappa", "over_refusal", "blind_f1", "degraded")})
    plain(f"written: {out / 'report.html'}")


@app.command()
def tune(
    folder: Folder,
    data: Data,
    max_fpr: Annotated[float, typer.Option("--max-fpr", help="Share of harmless content that may be flagged.")] = 0.01,
    split: Split = "evaluation",
    columns: Columns = None,
    benign: Annotated[str | None, typer.Option(help="Data whose questions are all harmless, beside --data.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The policy file to write.")] = Path("policy.yaml"),
    policy: PolicyFile = None,
    seed: Annotated[int, typer.Option(help="Of the halves: one chooses, the other measures.")] = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Choose thresholds for a stated false-positive rate; writes a policy file.

    Example: safe-rlhf-v guard tune runs/quickstart/guard --data runs/quickstart/data --max-fpr 0.05
    """
    from beavertails_v import load_responses
    from guard.classifier import Guard
    from guard.tune import sentences, tune_and_save

    judge = Guard.from_pretrained(folder, policy=policy, device=device, dtype=dtype)
    rows = load_responses(data, split, columns=columns)
    plain(rows.report.summary())
    harmless = () if benign is None else load_responses(benign, split, columns=columns).prompts()
    for sentence in sentences(tune_and_save(judge, rows, max_fpr, out, benign=harmless, seed=seed), max_fpr):
        plain(sentence)
    plain(f"written: {out}; use it by --policy {out} or guard.policy={out}")
