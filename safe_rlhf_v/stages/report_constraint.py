"""The constraint that a report holds a model against: its bound, its multiplier, and a test of the mean cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safe_rlhf_v import duals
from safe_rlhf_v.config import DirectSection, IterativeSection, PolicySection, Settings
from safe_rlhf_v.evaluation import Answer, read_metrics, safety_test
from safe_rlhf_v.stages.folder import read_done


def is_of(stage: str, output: Path, model: str | None) -> bool:
    """Whether the measured model is that of the stage, or one of its parts."""
    return bool(model) and Path(str(model)).resolve().is_relative_to((output / stage).resolve())


def _direct_constraint(direct: DirectSection, output: Path, bound: float) -> dict[str, Any]:
    """Most direct methods know no bound and no multiplier; it is the policy section's that is measured against."""
    measured = measured_of(output / "direct")
    method = direct.made()
    return {
        "threshold": getattr(method, "threshold", bound),
        "final_multiplier": measured.get("multiplier", getattr(method, "multiplier", 0.0)),
        "algorithm": direct.algorithm,
    }


def _iterative_constraint(section: IterativeSection, output: Path, bound: float) -> dict[str, Any]:
    """The bound on the mean over all prompts is the start model's mean cost less what was asked; else the policy's."""
    measured = measured_of(output / "iterative")
    multipliers, asked = measured.get("multiplier", {}), measured.get("requested")
    asked = asked.get("all") if isinstance(asked, dict) else asked
    bound = bound if asked is None else measured["reference_cost"] - asked
    found = {"threshold": bound, "final_multiplier": max(multipliers.values(), default=0.0)}
    return found | {"algorithm": section.algorithm}


def constraint_of(settings: Settings, bound: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """What the report holds the answers of settings.evaluation.model against."""
    output, policy = Path(settings.output_dir), settings.policy
    if is_of("direct", output, settings.evaluation.model):
        return _direct_constraint(settings.direct, output, bound)
    if is_of("iterative", output, settings.evaluation.model):
        return _iterative_constraint(settings.iterative, output, bound)
    return _policy_constraint(policy, output, bound, answers, settings.evaluation.delta)


def _policy_constraint(
    policy: PolicySection, output: Path, bound: float, answers: Sequence[Answer], delta: float
) -> dict[str, Any]:
    rule: Any = policy.rule()
    rows = metrics_of(output)
    costs = {i: a.cost for i, a in enumerate(answers) if a.cost is not None}
    of = [answers[i].prompt.id for i in costs]
    bounded = bounded_instead(policy, bound, list(costs.values()), of) if costs else None
    tested = None
    if costs and (bounded is None or policy.measure.kind == "high_confidence"):  # it tests the mean
        tested = safety_test(list(costs.values()), bound, of, delta=delta)
    return {
        "threshold": bound,
        "final_multiplier": rows[-1]["multiplier"] if rows else rule.init().value,
        "maximum_multiplier": most if math.isfinite(most := duals.bound(rule)) else None,
        "algorithm": policy.algorithm,
        "safety_test": tested,
        "bounded": bounded,
    }


def bounded_instead(
    policy: PolicySection, bound: float, costs: Sequence[float], prompts: Sequence[str] = ()
) -> dict[str, Any] | None:
    """What training bounded where it is not the mean cost: the name, its bound, and its value on these costs.

    prompts: that each cost is of; only a bound on every prompt's mean asks for them.
    """
    constraint, known = policy.constraint(bound), torch.tensor(costs, dtype=torch.float64)
    measure = constraint.measure
    if measure.words is None:
        return None
    if measure.samples > 1:
        known = torch.stack([known[[p == one for p in prompts]].mean() for one in dict.fromkeys(prompts)])
    return {"name": measure.words, "bound": constraint.threshold, "value": constraint.statistic(known[:, None])}


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Rows of the policy's metrics.jsonl, none where there is no policy."""
    file = output / "policy" / "metrics.jsonl"
    return list(read_metrics(file)) if file.is_file() else []


def measured_of(folder: Path) -> dict[str, Any]:
    """What a finished stage measured; {} where none is finished."""
    return (read_done(folder) or {}).get("measured") or {}
