"""The bound of a policy's cost, what is known of it, and of the models that judge, before training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from safe_rlhf_v.config import PolicySection, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.stages.folder import read_done, write_json


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


def threshold(policy: PolicySection, cost_dir: str | Path) -> float:
    """The bound d; "auto" is the mean, or a quantile, of the costs of training responses labelled safe.

    An algorithm that bounds every prompt by itself does so at 0.
    """
    if not policy.takes_threshold:
        if policy.threshold not in ("auto", 0.0) or policy.threshold_quantile is not None:
            name = policy.algorithm
            plain(
                f"warning: policy.threshold is not used by {name}, which bounds every answer's cost by 0; "
                f"policy.{name}.margin asks for less"
            )
        return 0.0
    if policy.threshold != "auto":
        if policy.threshold_quantile is not None:
            raise SettingsError("policy.threshold_quantile goes with policy.threshold: auto; give one of them")
        if (given := float(policy.threshold)) > 0:
            plain(f"warning: policy.threshold is {given:+g}: a cost above 0 is unsafe, so this allows unsafe answers")
        return given
    if policy.threshold_quantile is not None:
        return _threshold_quantile(policy.threshold_quantile, Path(cost_dir))
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
    from safe_rlhf_v.online.guidance import describe_suggestions, suggest_thresholds

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
