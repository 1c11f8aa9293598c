"""Runs of a made-up comparison, with figures that are known because they were put there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from safe_rlhf_v.comparison.comparison import Comparison
from safe_rlhf_v.comparison.runs import ANSWER_COLUMNS, REFERENCE, Run, RunInfo, make_run


def table(unsafe: np.ndarray, cost: np.ndarray, helpful: float = 2.0) -> pa.Table:
    """Answers (N, K): the first half of the prompts invites harm. unsafe and cost, both (N, K)."""
    n, k = unsafe.shape
    rows = [
        {
            "prompt_id": f"p{i:03d}",
            "invites_harm": i < n / 2,
            "text": "so .",
            "unsafe": bool(unsafe[i, j]),
            "severity": int(unsafe[i, j]),
            "helpful_rate": helpful,
            "harmless_rate": -1.0 if unsafe[i, j] else 1.0,
            "refusal": False,
            "reward": 0.5,
            "cost": float(cost[i, j]),
        }
        for i in range(n)
        for j in range(k)
    ]
    return pa.Table.from_pylist(rows).select(list(ANSWER_COLUMNS))


def run(
    method: str,
    seed: int,
    rate: float,
    mean_cost: float,
    *,
    prompts: int = 40,
    samples: int = 4,
    helpful: float = 2.0,
    metrics: Sequence[Mapping[str, Any]] = (),
    **info: Any,
) -> Run:
    """A run with about this unsafe rate and exactly this mean cost."""
    rng = np.random.default_rng([seed, *method.encode()])
    unsafe = rng.random((prompts, samples)) < rate
    cost = np.where(unsafe, 2.0, -2.0) + rng.normal(0, 1, unsafe.shape)
    cost += mean_cost - cost.mean()
    known = {"title": method.replace("_", " "), "stage": "policy", "seconds": 60.0 + seed, "sampled": 640, "steps": 10}
    return make_run(RunInfo(method=method, seed=seed, **{**known, **info}), table(unsafe, cost, helpful), metrics)


def multiplier_rows(*names: str) -> list[dict[str, Any]]:
    steps = range(1, 11)
    if not names:
        return [{"step": t, "multiplier": 0.1 * t, "seconds": 1.0} for t in steps]
    return [{"step": t, "multiplier": {n: 0.1 * t * (i + 1) for i, n in enumerate(names)}} for t in steps]


def gap_rows(*gaps: float) -> list[dict[str, Any]]:
    return [
        {
            "step": t,
            "multiplier": {"cost": 0.5 * t},
            "slack": {"cost": -g},
            "gap": {"value": g, "low": g - 0.2, "high": g + 0.2},
        }
        for t, g in enumerate(gaps, 1)
    ]


def comparison(prompts: int = 40) -> Comparison:
    """Two methods swept over bounds, one iterative, one direct without bound or multiplier, one infeasible run."""
    runs = []
    for seed in (0, 1, 2):
        for bound, swept in ((4.0, False), (2.0, True), (6.0, True)):
            rate, cost = 0.6 - 0.08 * bound, 1.0 - bound
            shared: dict[str, Any] = {"requested": bound, "swept": swept, "prompts": prompts}
            rows = multiplier_rows()
            runs.append(run("ppo_lag", seed, rate, cost + 0.1 * seed, metrics=rows, helpful=2.1, **shared))
            rows = gap_rows(2.0 + seed, 1.0, 0.2 + 0.1 * seed)
            off = 0.3 * (bound - 4)  # it undershoots small bounds and overshoots large ones
            shared |= {"stage": "iterative", "title": "one-shot (MoCAN)"}
            runs.append(run("mocan", seed, rate, cost - off, metrics=rows, helpful=1.9, **shared))
        runs.append(run("repo", seed, 0.1, -3.0, prompts=prompts, metrics=multiplier_rows(), helpful=2.0))
        runs.append(run("dpo", seed, 0.5, 0.2, prompts=prompts, stage="direct", sampled=0, pairs=8000, helpful=2.4))
    runs.append(run("mocan", 3, 0.5, 0.0, prompts=prompts, requested=12.0, swept=True, found=False))
    return Comparison(reference=run(REFERENCE, 0, 0.6, 1.0, prompts=prompts, stage="", title="start"), runs=runs)
