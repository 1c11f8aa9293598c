"""Commands that train."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from safe_rlhf_v.cli.common import Config, Overrides, plain, settings_of, show
from safe_rlhf_v.command_line import App

app = App(
    no_args_is_help=True,
    short_help="Train one stage: sft, reward, cost, policy, direct, iterative, guard; or a start model.",
    help="""Train one stage, in the order sft (may be left out), reward, cost, policy; guard at any time after sft;
direct (DPO and its neighbours) and iterative (CAID) are other roads to a policy.
The settings name your model (model.path) and your data (data.path). Each stage writes to
<output_dir>/<stage>, goes on where it was killed, and is skipped once it is done. On several GPUs:
accelerate launch -m safe_rlhf_v.cli train reward --config run.yaml""",
)
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Throw away what the stage wrote before, and start again.")
]


def _run(stage: str, config: Config, overrides: Overrides, overwrite: bool) -> None:
    from safe_rlhf_v.stages.start import guard_figures, require_start

    settings = settings_of(config, overrides, stage)
    require_start(settings, stage)  # before torch is imported and every picture is read
    from safe_rlhf_v.stages.stages import STAGES

    measured = STAGES[stage].run(settings, overwrite=overwrite)
    show(stage, guard_figures(measured) if stage == "guard" else measured)
    plain(f"written: {settings.output_dir}/{stage}")
    plain(f"next: {next_command(stage, config, overrides)}")


def next_command(stage: str, config: Path | None, overrides: list[str] | None) -> str:
    """What comes after a stage, with the same settings."""
    following = {"sft": "train reward", "reward": "train cost", "cost": "train policy"}.get(stage, "evaluate")
    where = [] if config is None else ["--config", str(config)]
    return shlex.join(["safe-rlhf-v", *following.split(), *where, *(overrides or [])])


@app.command()
def sft(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Supervised fine-tuning on the responses of the data.

    Example: safe-rlhf-v train sft --config run.yaml sft.responses=safer sft.learning_rate=1e-5
    """
    _run("sft", config, overrides, overwrite)


@app.command()
def reward(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """The reward model: which of two responses is more helpful.

    Example: safe-rlhf-v train reward --config run.yaml reward.num_train_epochs=1
    """
    _run("reward", config, overrides, overwrite)


@app.command()
def cost(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """The cost model: which of two responses is safer, and, by its sign, whether a response is unsafe.

    Example: safe-rlhf-v train cost --config run.yaml cost.sign_weight=2
    """
    _run("cost", config, overrides, overwrite)


@app.command()
def policy(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """The policy: raise reward while the mean cost stays at or under policy.threshold. Needs reward and cost models.

    Example: safe-rlhf-v train policy --config run.yaml policy.algorithm=ppo_lag policy.threshold=auto
    """
    _run("policy", config, overrides, overwrite)


@app.command()
def direct(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """A policy from the pairs themselves, without sampling: dpo, kto, sacpo, safe_dpo, bfpo, c_dpo or mm_dpo.

    Example: safe-rlhf-v train direct --config run.yaml direct.algorithm=sacpo direct.sacpo.lam=4
    """
    _run("direct", config, overrides, overwrite)


@app.command()
def iterative(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """A policy whose cost is lower than the start model's by what you ask: caid, pecaid, or one-shot mocan, pecan.

    Example: safe-rlhf-v train iterative --config run.yaml iterative.bounds=3 iterative.iterations=4
    """
    _run("iterative", config, overrides, overwrite)


@app.command("start")
def start_model(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    pictures: Annotated[Path | None, typer.Option(help="Pictures OBJECT/STYLE.png in place of drawn ones.")] = None,
    held_out_style: Annotated[str | None, typer.Option(help="Style never trained on; the last by name.")] = None,
    tower: Annotated[Path | None, typer.Option(help="A tower.safetensors or start.safetensors to begin with.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures drawn.")] = 30_000,
    tower_steps: Annotated[int, typer.Option(min=1, help="Steps that teach the tower to see.")] = 10_000,
    naming_steps: Annotated[int, typer.Option(min=1, help="Steps that teach the model to say what it sees.")] = 1_500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of pictures, weights and order.")] = 0,
) -> None:
    """The picture world's start model: a vision tower that sees, a language model that names. One for drawings ships.

    Example: safe-rlhf-v train start runs/start --pictures my_pictures --held-out-style oil
    """
    from safe_rlhf_v.demo.naming import teach_names
    from safe_rlhf_v.demo.tower import TowerSettings, pretrain_tower

    seeing = TowerSettings(pictures=count, steps=tower_steps, seed=seed)
    naming = TowerSettings(pictures=count // 3 * 2, steps=naming_steps, learning_rate=2e-3, seed=seed)
    seen = pretrain_tower(output, seeing, pictures, held_out_style, tower)
    named = teach_names(output, output, naming, pictures, held_out_style)
    for title, report in (("tower: right on fresh pictures", seen), ("model: names fresh pictures", named)):
        show(title, report["accuracy"])
    plain(f"written: {output}")


@app.command()
def guard(config: Config = None, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """The guard: judges questions and answers, with category and severity.

    Example: safe-rlhf-v train guard --config run.yaml guard.max_steps=500
    """
    _run("guard", config, overrides, overwrite)
