"""The root of the command line."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from safe_rlhf_v.cli import data, guard, refine, train
from safe_rlhf_v.cli.common import Config, Overrides, plain, settings_of, show
from safe_rlhf_v.command_line import App

app = App(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Safety alignment of vision-language models: preference data, reward and cost models, constrained training,
a graded guard.

Start with [bold]safe-rlhf-v quickstart[/]: it needs no download and shows every stage on two CPU cores.

Exit codes: 0 done; 1 a verdict, as flagged or faults found; 2 a mistake in what was given; 70 a fault of this
program; 130 stopped.

A real run takes one YAML file, which names your model and your data, and one command a stage:

safe-rlhf-v train sft     --config configs/own_data.yaml

safe-rlhf-v train reward  --config configs/own_data.yaml

safe-rlhf-v train cost    --config configs/own_data.yaml

safe-rlhf-v train policy  --config configs/own_data.yaml

safe-rlhf-v train guard   --config configs/own_data.yaml

safe-rlhf-v evaluate      --config configs/own_data.yaml""",
)
app.add_typer(data.app, name="data", rich_help_panel="A real run")
app.add_typer(train.app, name="train", rich_help_panel="A real run")
app.add_typer(guard.app, name="guard", rich_help_panel="A real run")
app.add_typer(refine.app, name="refine", rich_help_panel="A real run")


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        plain(f"safe-rlhf-v {version('safe-rlhf-v')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Show the version and stop.")
    ] = False,
) -> None:
    if debug:
        os.environ["SAFE_RLHF_V_DEBUG"] = "1"


@app.command(rich_help_panel="Start here")
def quickstart(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings instead of the demo's.")] = None,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the world, the weights and all sampling.")] = None,
    train: Annotated[int, typer.Option(min=1, help="Training pairs drawn.")] = 12_000,
    evaluation: Annotated[int, typer.Option(min=1, help="Evaluation pairs drawn.")] = 600,
    pictures: Annotated[Path | None, typer.Option(help="Your own pictures, OBJECT/STYLE.png, not drawn ones.")] = None,
    held_out_style: Annotated[str | None, typer.Option(help="Style of --pictures kept for evaluation.")] = None,
    start: Annotated[Path | None, typer.Option(help="Start model made by `train start`, for --pictures.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores to keep busy; else all that there are.")] = None,
) -> None:
    """The demo: draw a world, align a small model in it, guard it, report what changed. Nothing is downloaded.

    Stages that do not wait for one another run side by side. Run again, it goes on where it was stopped.

    Example: safe-rlhf-v quickstart --seed 1 output_dir=runs/first
    """
    from safe_rlhf_v.demo.quickstart import run

    run(
        config,
        [*(overrides or []), *([] if seed is None else [f"seed={seed}"])],
        train=train,
        evaluation=evaluation,
        pictures=pictures,
        held_out_style=held_out_style,
        start=start,
        cores=cores,
    )


@app.command(rich_help_panel="Start here")
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write them to.")] = Path("configs"),
) -> None:
    """Write own_data.yaml and the recipes for models of several sizes, to be changed as you like.

    Example: safe-rlhf-v init my_configs
    """
    from safe_rlhf_v.planning.recipes import write_recipes

    files = write_recipes(folder)
    plain(f"written: {len(files)} files below {folder}")
    own = folder / "own_data.yaml"
    plain(f"next: put your model and data into {own}, then: safe-rlhf-v doctor --config {own}")


@app.command("settings", rich_help_panel="Start here")
def settings_command(
    config: Config = None,
    overrides: Overrides = None,
    search: Annotated[str, typer.Option(help="Only settings whose name or description holds this.")] = "",
    save: Annotated[Path | None, typer.Option(help="Write all settings to this YAML file.")] = None,
) -> None:
    """List every setting with its value, its default and what it means.

    Example: safe-rlhf-v settings --search threshold

    Example: safe-rlhf-v settings --config run.yaml policy.beta=0.1 --save full.yaml
    """
    from safe_rlhf_v.planning.settings_table import print_settings

    settings = settings_of(config, overrides)
    print_settings(settings, search)
    if save is not None:
        settings.save(save)
        plain(f"written: {save}")


@app.command(rich_help_panel="Start here")
def doctor(
    config: Config = None,
    overrides: Overrides = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of the GPU you mean; else the one here.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them; else those here.")] = None,
    fsdp2: Annotated[bool, typer.Option("--fsdp2", help="The policy's separate models are cut over them.")] = False,
    stage: Annotated[list[str] | None, typer.Option(help="sft, reward, cost, guard, direct, iterative, policy")] = None,
    model_config: Annotated[str | None, typer.Option(help="Folder with the model's config.json alone.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt, if the settings set none.")] = None,
    reserve: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the memory to leave free.")] = 0.1,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
) -> None:
    """Check versions, device, model and data of a run, and predict the memory of its stages. Loads no weights.

    The exit code is 1 where a check fails or a stage does not fit.

    Example: safe-rlhf-v doctor --config configs/qwen2_5_vl_7b_lora.yaml --memory 80

    Example: safe-rlhf-v doctor --config configs/qwen2_5_vl_7b_full.yaml --memory 80 --gpus 8 --fsdp2 --stage policy
    """
    from safe_rlhf_v.config_io import SettingsError
    from safe_rlhf_v.planning.doctor import examine, stages_of, this_machine
    from safe_rlhf_v.planning.doctor_report import as_json, print_report
    from safe_rlhf_v.planning.stages import SUPERVISED

    if unknown := set(stage or []) - {*SUPERVISED, "policy"}:
        raise SettingsError(f"--stage {sorted(unknown)[0]}: should be one of {', '.join([*SUPERVISED, 'policy'])}")
    machine = this_machine(gpus, memory, fsdp2, reserve)
    settings = settings_of(config, overrides)
    report = examine(
        settings,
        machine,
        stages=stage or stages_of(settings),
        model_config=model_config,
        prompt_tokens=prompt_tokens,
    )
    if json_:
        plain(json.dumps(as_json(report), indent=2))
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel="A real run")
def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model, for example runs/quickstart/policy.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="Picture; may be given more than once.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Question about the picture.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answer a whole split into this .jsonl.")
    ] = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Setting, such as generation.temperature=0.7.")
    ] = None,
) -> None:
    """Answer one question about a picture, or every prompt of a data set's evaluation split.

    Example: safe-rlhf-v generate runs/quickstart/policy --image photo.png --prompt "what is this ?"

    Example: safe-rlhf-v generate runs/quickstart/policy --output answers.jsonl -s data.path=runs/quickstart/data
    """
    from safe_rlhf_v.config_io import SettingsError
    from safe_rlhf_v.stages.answering import answer_one, answer_split

    settings = settings_of(config, set_, "generation")
    if (prompt is None) == (output is None):
        raise SettingsError("give --prompt for one question, or --output for a whole split (and not both)")
    speech = (settings.model, settings.generation, settings.seed)
    if prompt is not None:
        plain(answer_one(model, prompt, image or [], *speech))
    else:
        count = answer_split(model, output, settings.data, *speech)  # type: ignore[arg-type]
        plain(f"{count} answers written: {output}")


@app.command(rich_help_panel="A real run")
def export(
    model: Annotated[str, typer.Argument(help="Folder of a stage, for example runs/quickstart/policy, or an adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    dtype: Annotated[str, typer.Option(help="Type of its weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Merge adapters into one whole model that transformers loads by itself, with its processor.

    Example: safe-rlhf-v export runs/own_data/policy policy_merged --dtype bfloat16
    """
    from safe_rlhf_v.config_io import SettingsError
    from safe_rlhf_v.training.checkpoint import atomic_directory
    from safe_rlhf_v.vlm.export import export_model

    if output.exists():
        raise SettingsError(f"{output} is there already: name a new folder")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise SettingsError(f"--dtype {dtype}: use float32, bfloat16 or float16")
    with atomic_directory(output) as folder:
        export_model(model, folder, dtype)
    plain(f"written: {output}")


@app.command(rich_help_panel="A real run")
def evaluate(config: Config = None, overrides: Overrides = None) -> None:
    """Compare the aligned model with the one it started from, on the evaluation split; write report.html.

    Needs a trained policy, reward and cost model; a trained guard is measured too. Writes to output_dir; where
    evaluation.model names another model than its policy, to output_dir/evaluation/NAME.
    Judged by the picture world's oracle where the data is of that world, else by the trained reward and cost models.

    Example: safe-rlhf-v evaluate --config run.yaml evaluation.samples=4
    """
    from safe_rlhf_v.stages.evaluate import evaluate as run

    result = run(settings_of(config, overrides, "evaluation"))
    show("evaluation", result["headline"])
    if not result["usual"]:
        plain(f"judged: {result['model']}, in a report of its own; that of the policy stays as it is")
    plain(f"report: {result['report']}")
    plain(f"next: {shlex.join(['safe-rlhf-v', 'generate', result['model']])} --image PICTURE --prompt QUESTION")


@app.command()
def compare(
    config: Config = None,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short form: what the file says under `quick`.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and what is done of them; run nothing.")] = False,
) -> None:
    """Train several methods from one base, over seeds and bounds, and write one page that compares them.

    Runs stand beside each other in parallel processes. Run again, it goes on where it was stopped. A run that fails is
    named and the others go on; the exit code is then 1.

    Example: safe-rlhf-v compare --config configs/compare.yaml --quick

    Example: safe-rlhf-v compare --config configs/compare.yaml seeds=[0,1,2,3,4] output_dir=runs/five
    """
    from safe_rlhf_v.comparison.compare import compare as run
    from safe_rlhf_v.comparison.compare import show_plan
    from safe_rlhf_v.comparison.settings import load_compare

    settings = load_compare(config, overrides or [], quick=quick)
    if plan:
        show_plan(settings)
    elif not run(settings):
        raise typer.Exit(1)
