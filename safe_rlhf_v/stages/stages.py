"""The stages of a run, each a function of the settings. A stage writes to <output_dir>/<stage>, is skipped once it is
done, and goes on from its newest checkpoint where it was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import Tensor

from beavertails_v import ComparisonSet, Prompt
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.models.kind import require_answering
from safe_rlhf_v.models.processing import Encoder, load_processor
from safe_rlhf_v.stages import build
from safe_rlhf_v.stages.folder import LEFT_OUT, main_process, read_done, run_stage, write_json
from safe_rlhf_v.training.card import write_card
from safe_rlhf_v.training.encode import LeftOut, dropped, encodable, write_left_out
from safe_rlhf_v.training.supervised import opens_pictures, train_preference_model, train_sft


def sft(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Supervised fine-tuning of model.path."""
    base = build.base_model(settings)

    def work(folder: Path) -> dict[str, Any]:
        build.look_first(settings, base)
        return train_sft(
            build.comparisons(settings, "train"), build.comparisons(settings, "evaluation"), base, folder, settings
        )

    return run_stage("sft", settings, ["sft"], work, overwrite=overwrite)


def reward(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """The reward model, on the model the policy starts from."""
    return _preference("reward", settings, overwrite)


def cost(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """The cost model, on the model the policy starts from."""
    return _preference("cost", settings, overwrite)


def _preference(kind: Literal["reward", "cost"], settings: Settings, overwrite: bool) -> dict[str, Any]:
    start = build.start_model(settings)

    def work(folder: Path) -> dict[str, Any]:
        build.look_first(settings, start)
        train, held_out = build.comparisons(settings, "train"), build.comparisons(settings, "evaluation")
        return train_preference_model(kind, train, held_out, start, folder, settings)

    return run_stage(kind, settings, [kind], work, overwrite=overwrite, start=start)


def guard(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """The guard, on the model the policy starts from."""
    start = build.start_model(settings)

    def work(folder: Path) -> dict[str, Any]:
        from guard.policy import Policy
        from guard.train import GuardOptions, train_guard

        build.look_first(settings, start)
        section = settings.guard
        options = section.model_dump(include=set(GuardOptions.__dataclass_fields__) & set(type(section).model_fields))
        return train_guard(
            build.responses(settings, "train"),
            build.responses(settings, "evaluation"),
            start,
            folder,
            settings,
            benign=build.benign_prompts(settings, "train"),
            benign_evaluation=build.benign_prompts(settings, "evaluation"),
            options=GuardOptions(**options),
            policy=Policy.load(section.policy) if section.policy else None,
        )

    return run_stage("guard", settings, ["guard"], work, overwrite=overwrite, start=start)


def direct(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Training on pairs without sampling: DPO and its safe variants; the folder is a whole model."""
    from safe_rlhf_v.algorithms.sacpo import SACPO
    from safe_rlhf_v.training.direct import train_direct, train_sacpo

    start, section = build.start_model(settings), settings.direct
    if section.reference:
        require_answering(section.reference, "direct.reference")
    algorithm = build.direct_algorithm(settings)
    scores: dict[str, Any] = {}
    if getattr(algorithm, "needs_scores", False):
        for kind in ("reward", "cost"):
            key = f"{kind}_model"
            scores[key] = build.trained(settings, kind, getattr(section, key), f"direct.{key}")

    def work(folder: Path) -> dict[str, Any]:
        build.look_first(settings, start)
        train, held_out = build.comparisons(settings, "train"), build.comparisons(settings, "evaluation")
        shared = (train, held_out, start, folder, settings, section, section.reference)
        if isinstance(algorithm, SACPO):
            return train_sacpo(algorithm, *shared)
        return train_direct(algorithm, *shared, **scores)

    reference = {"reference": section.reference} if section.reference else {}
    return run_stage("direct", settings, ["direct"], work, overwrite=overwrite, start=start, **scores, **reference)


def iterative(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Iterative or one-shot dualisation: DPO on samples relabelled by r + lam.g; the folder is the best iterate."""
    from safe_rlhf_v.training.iterative_model import PREFERENCE_BASED

    start, section = build.start_model(settings), settings.iterative
    if section.algorithm in PREFERENCE_BASED:
        keys = ("helpful_policy", "safe_policy")
        what = "the folder of a policy trained by `train direct`, direct.dpo.axis more_helpful or safer"
        sources = {key: build.require(getattr(section, key), f"iterative.{key}", what) for key in keys}
        for key in keys:
            require_answering(sources[key], f"iterative.{key}")
    else:
        kinds = {f"{kind}_model": kind for kind in ("reward", "cost")}
        sources = {k: build.trained(settings, kind, getattr(section, k), f"iterative.{k}") for k, kind in kinds.items()}

    def work(folder: Path) -> dict[str, Any]:
        build.look_first(settings, start)
        return _train_iterative(settings, folder, start, tuple(sources.values()))

    return run_stage("iterative", settings, ["iterative"], work, overwrite=overwrite, start=start, **sources)


def _train_iterative(settings: Settings, folder: Path, start: str, sources: Any) -> dict[str, Any]:
    from safe_rlhf_v.training.iterative import IterativeArguments, iterate, summary
    from safe_rlhf_v.training.iterative_model import ModelProblem, iterations, save_best

    build.one_process("train iterative")
    section = settings.iterative
    encoder = Encoder(load_processor(start), settings.model.max_prompt_length)
    data = build.comparisons(settings, "train")
    prompts, left_out = readable(data, encoder, thorough=opens_pictures(settings))
    write_left_out(folder, left_out)
    problem = ModelProblem(settings, folder, start, sources, prompts, build.device(), data)
    args = IterativeArguments(
        output_dir=folder,
        iterations=iterations(section),
        eta=section.eta,
        level=section.confidence,
        draws=section.bootstrap,
    )
    result = iterate(problem, args)
    if result.best is None:
        reach = dict(zip(problem.names, (round(x, 2) for x in result.one_shot.reachable), strict=True))
        raise SettingsError(
            f"iterative.bounds = {section.bounds} is out of reach: there is no finite multiplier for it. The best of "
            f"{section.samples} samples of every prompt improve by {reach}, each alone; ask for less, or raise "
            "iterative.samples"
        )
    measured = {"algorithm": section.algorithm, "prompts": len(prompts), "left_out": len(left_out)}
    measured |= summary(result, problem.names, section.bounds) | {"reference_cost": problem.reference_cost()}
    chosen = result.iterates[result.best].iteration
    if not result.feasible:
        plain(f"no iteration keeps every bound; iteration {chosen}, which misses by least, is saved")
    save_best(problem.policy(chosen), folder, settings.model.dtype)
    settings.save(folder / "settings.yaml")
    write_card(folder, "iterative", start, settings, measured)
    return measured


def policy(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Constrained training of the policy against the reward and cost model; the folder itself loads as a model."""
    start = build.start_model(settings)
    reward_dir = build.trained(settings, "reward", settings.policy.reward_model, "policy.reward_model")
    cost_dir = build.trained(settings, "cost", settings.policy.cost_model, "policy.cost_model")

    def work(folder: Path) -> dict[str, Any]:
        build.look_first(settings, start)
        return _train_policy(settings, folder, start, reward_dir, cost_dir)

    models = {"start": start, "reward": reward_dir, "cost": cost_dir}
    return run_stage("policy", settings, ["policy"], work, overwrite=overwrite, **models)


def _train_policy(settings: Settings, folder: Path, start: str, reward_dir: str, cost_dir: str) -> dict[str, Any]:
    from safe_rlhf_v.training.online import OnlineTrainer

    warn_of_judges(reward_dir, cost_dir)
    bound = threshold(settings, cost_dir)
    if settings.policy.guidance_rollouts and build.takes_threshold(settings):
        show_suggestions(bound, Path(cost_dir), folder)
    data = build.comparisons(settings, "train")
    set_seed(settings.seed)  # fresh adapters: the same on every rank, and whichever stages ran before in this process
    roles = build.roles(settings, start, reward_dir, cost_dir)
    prompts, left_out = readable(data, roles.encoder, thorough=opens_pictures(settings))
    unused: list[LeftOut] = []
    demonstrations = build.demonstrations(settings, data, roles.encoder, unused)
    if main_process():
        write_left_out(folder, left_out + unused)
    trainer = OnlineTrainer(
        roles,
        build.algorithm(settings, bound),
        build.constraint(settings, bound),
        prompts,
        build.online_arguments(settings, folder),
        demonstrations=demonstrations,
        engine=build.engine(settings, start, roles, folder),
    )
    result = trainer.train(resume_from_checkpoint="auto")
    last = result.metrics[-1]
    shown = ("reward", "cost", "violation", "multiplier", "kl", "unsafe_share", "response_length")
    measured: dict[str, Any] = {"steps": result.steps, "threshold": bound, "algorithm": settings.policy.algorithm}
    measured |= {
        "prompts": len(prompts),
        "left_out": len(left_out),
        "last_step": {k: last[k] for k in shown if k in last},
    }
    if trainer.accelerator.is_main_process:
        _move_up(result.policy_dir, folder)
        for sent in folder.glob("vllm-*"):  # adapters of past rollouts
            shutil.rmtree(sent)
        settings.save(folder / "settings.yaml")
        write_card(folder, "policy", start, settings, measured)
    trainer.accelerator.wait_for_everyone()
    return measured


def warn_of_judges(reward_dir: str, cost_dir: str) -> None:
    """Say, before hours are spent, where the models that a policy will be trained against cannot judge."""
    from safe_rlhf_v.evaluation.judge_quality import warning
    from safe_rlhf_v.evaluation.preference import read_preference

    if os.environ.get("RANK", "0") != "0":
        return
    folders: dict[Literal["reward", "cost"], str] = {"reward": reward_dir, "cost": cost_dir}
    for kind, folder in folders.items():
        if text := warning(kind, read_preference(Path(folder), kind), folder):
            plain(text)


def _move_up(source: Path, folder: Path) -> None:
    """The policy's files into the stage's folder, so that this folder loads as a model."""
    for path in source.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(source)


def threshold(settings: Settings, cost_dir: str | Path) -> float:
    """The bound d; "auto" is the mean, or a quantile, of the costs of training responses labelled safe.

    An algorithm that bounds every prompt by itself does so at 0.
    """
    if not build.takes_threshold(settings):
        if settings.policy.threshold not in ("auto", 0.0) or settings.policy.threshold_quantile is not None:
            name = settings.policy.algorithm
            plain(
                f"warning: policy.threshold is not used by {name}, which bounds every answer's cost by 0; "
                f"policy.{name}.margin asks for less"
            )
        return 0.0
    if settings.policy.threshold != "auto":
        if settings.policy.threshold_quantile is not None:
            raise SettingsError("policy.threshold_quantile goes with policy.threshold: auto; give one of them")
        if (given := float(settings.policy.threshold)) > 0:
            plain(f"warning: policy.threshold is {given:+g}: a cost above 0 is unsafe, so this allows unsafe answers")
        return given
    if settings.policy.threshold_quantile is not None:
        return _threshold_quantile(settings.policy.threshold_quantile, Path(cost_dir))
    done = read_done(Path(cost_dir))
    mean = (done or {}).get("measured", {}).get("train_sample", {}).get("mean_cost_safe")
    if mean is None:
        raise SettingsError(
            f"policy.threshold = 'auto' needs the figures of a cost model trained here, and {cost_dir} has none; "
            "give a number"
        )
    plain(f"threshold: {mean:+.3f}, the mean cost of the training data's responses labelled safe")
    return _at_most_0(float(mean))


def _threshold_quantile(quantile: float, cost_dir: Path) -> float:
    costs, unsafe = scores(cost_dir / "train_scores.jsonl")
    if unsafe.all():
        raise SettingsError(
            f"policy.threshold_quantile needs the costs of safe responses, and {cost_dir}/train_scores.jsonl has none; "
            "train the cost model here, or give policy.threshold a number"
        )
    bound = torch.quantile(costs[~unsafe].double(), quantile).item()
    plain(f"threshold: {bound:+.3f}, {quantile:.0%} quantile of the costs of safe training responses")
    return _at_most_0(bound)


def _at_most_0(bound: float) -> float:
    """A bound found in the data, but never above 0, from where on a cost means unsafe."""
    if bound <= 0:
        return bound
    plain(
        f"warning: {bound:+.3f} is above 0, and a cost above 0 is unsafe: the bound is 0 instead. The cost model puts "
        "many safe responses above 0; train it again, or give policy.threshold the number you mean"
    )
    return 0.0


def scores(file: Path) -> tuple[Tensor, Tensor]:
    """Costs and unsafe labels (n,) of the responses in a preference model's scores; of none where there is no file."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    costs = torch.tensor([row["scores"] for row in rows]).flatten()
    return costs, torch.tensor([row["unsafe"] for row in rows], dtype=torch.bool).flatten()


def show_suggestions(bound: float, cost_dir: Path, folder: Path) -> None:
    """What thresholds mean to the cost model, by the held-out scores that its training left; nothing without them."""
    from safe_rlhf_v.training.guidance import describe_suggestions, suggest_thresholds

    costs, unsafe = scores(cost_dir / "evaluation_scores.jsonl")
    if not unsafe.any() or unsafe.all() or os.environ.get("RANK", "0") != "0":
        return
    try:
        found = suggest_thresholds(costs[~unsafe], costs[unsafe], bound)
    except ValueError as error:  # of few responses perhaps, so training goes on
        plain(f"warning: {cost_dir}: {error}")
        return
    write_json(folder / "suggested_thresholds.json", found)
    plain(describe_suggestions(found))


def readable(
    data: ComparisonSet, encoder: Encoder, *, thorough: bool = False, listed: str | Path = LEFT_OUT
) -> tuple[list[Prompt], list[LeftOut]]:
    """The prompts of a data set that the model can read; the others, said and by name, after those loading left out.

    listed: the file in which they will be.
    """
    prompts = data.prompts()
    kept, left_out = encodable(prompts, encoder, data, thorough=thorough)
    if left_out:
        plain(f"{len(left_out)} of {len(prompts)} prompts left out, see {listed}")
    return kept, dropped(data) + left_out


def evaluate(settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Compare the aligned model with its start; writes a report."""
    from safe_rlhf_v.stages.evaluate import evaluate as run

    return run(settings)
