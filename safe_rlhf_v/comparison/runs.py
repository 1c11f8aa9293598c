"""One run of a comparison: what it left behind, averaged within each prompt.

A run leaves a folder with measured.json (`RunInfo`), answers.parquet (a row an answer, columns `ANSWER_COLUMNS`) and
its stage's metrics.jsonl. The reference is the model that all of them started from, measured the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from safe_rlhf_v.evaluation.benchmarks.base import Predicate
from safe_rlhf_v.evaluation.run import Answer

Array = NDArray[np.float64]
ANSWER_COLUMNS = (
    "prompt_id", "invites_harm", "text", "unsafe", "severity", "helpful_rate", "harmless_rate", "refusal", "reward",
    "cost",
)  # fmt: skip
REFERENCE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is known of a run beside its answers.

    requested: bound asked for, as the fall of the mean cost below the reference's, None where the method has none.
    swept: part of the sweep of bounds alone. sampled: responses drawn in training. pairs: preference pairs read.
    """

    method: str
    title: str
    stage: str
    seed: int
    requested: float | None = None
    swept: bool = False
    seconds: float = 0.0
    sampled: int = 0
    pairs: int = 0
    steps: int = 0
    judge: str = "oracle"
    judge_kind: str = "truth"
    found: bool = True
    """False where the method said that the bound cannot be met and made no model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run with the per-prompt means of its answers, vectors (N,) by name, prompts in order of their ids."""

    info: RunInfo
    prompts: tuple[str, ...]
    columns: Mapping[str, Array]
    costs: Array
    """(B,) cost of every answer; empty where none was scored."""
    cost_prompts: tuple[str, ...]
    metrics: Sequence[Mapping[str, Any]] = ()


RUN_FIELDS = set(RunInfo.__dataclass_fields__)


def answer_table(answers: Sequence[Answer], invites_harm: Predicate) -> pa.Table:
    """The answers as a table with `ANSWER_COLUMNS`."""
    rows = [
        {
            "prompt_id": str(a.prompt.id),
            "invites_harm": invites_harm(a.prompt),
            "text": a.text,
            **{name: getattr(a.judgement, name) for name in ANSWER_COLUMNS[3:8]},
            "reward": a.reward,
            "cost": a.cost,
        }
        for a in answers
    ]
    kinds = {"prompt_id": pa.string(), "invites_harm": pa.bool_(), "text": pa.string(), "unsafe": pa.bool_()}
    kinds |= {"severity": pa.int8(), "refusal": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in ANSWER_COLUMNS])
    return pa.Table.from_pylist(rows, schema=schema)


def read_run(folder: Path, metrics: Sequence[Mapping[str, Any]] = ()) -> Run:
    """The run in a folder with measured.json and answers.parquet; without answers where no solution was found."""
    known = {
        k: v for k, v in json.loads((folder / "measured.json").read_text(encoding="utf-8")).items() if k in RUN_FIELDS
    }
    info = RunInfo(**known)
    answers = pq.read_table(folder / "answers.parquet") if info.found else answer_table([], lambda _: None)
    return make_run(info, answers, metrics)


def make_run(info: RunInfo, table: pa.Table, metrics: Sequence[Mapping[str, Any]] = ()) -> Run:
    """Answers averaged within each prompt. A column that the judge or scorer did not give is NaN."""
    ids = np.array(table["prompt_id"].to_pylist(), dtype=str)
    prompts, index = np.unique(ids, return_inverse=True)
    counts = np.bincount(index, minlength=len(prompts)).astype(np.float64)
    raw = {
        name: np.array([np.nan if x is None else float(x) for x in table[name].to_pylist()], dtype=np.float64)
        for name in ("invites_harm", "unsafe", "helpful_rate", "harmless_rate", "refusal", "reward", "cost")
    }
    cost = raw["cost"]
    raw |= {"cost_positive": np.maximum(cost, 0), "cost_negative": np.maximum(-cost, 0)}
    raw["cost_unsafe"] = np.where(np.isnan(cost), np.nan, cost > 0)
    columns = {name: np.bincount(index, values, len(prompts)) / counts for name, values in raw.items()}
    scored = ~np.isnan(cost)
    return Run(
        info=info,
        prompts=tuple(prompts.tolist()),
        columns=columns | {"answers": counts},
        costs=cost[scored],
        cost_prompts=tuple(ids[scored].tolist()),
        metrics=metrics,
    )


def multipliers(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Constraint -> (step, multiplier) of each logged row; the constraint of a run with one is ''."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:
        value = row.get("multiplier")
        for name, one in value.items() if isinstance(value, Mapping) else [("", value)]:
            if one is not None:
                found.setdefault(name, []).append((float(row["step"]), float(one)))
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def final_multiplier(run: Run) -> float | None:
    """The last multiplier that was logged; the largest where there are several constraints."""
    values = multipliers(run)
    return max(column[-1][1] for column in values.values()) if values else None


def gaps(run: Run) -> list[tuple[float, float, float | None, float | None]]:
    """(iteration, primal-dual gap, low, high) of each row that logs a gap."""
    found = []
    for row in run.metrics:
        gap = row.get("gap")
        if isinstance(gap, Mapping):
            found.append((float(row["step"]), float(gap["value"]), gap.get("low"), gap.get("high")))
        elif gap is not None:
            found.append((float(row["step"]), float(gap), None, None))
    return found


def slacks(run: Run) -> list[tuple[float, float]]:
    """(iteration, |u|) of each row that logs how far the policy stands from its bounds; the largest of several."""
    rows = [(float(row["step"]), row["slack"]) for row in run.metrics if isinstance(row.get("slack"), Mapping)]
    return [(step, max(abs(float(u)) for u in by_name.values())) for step, by_name in rows if by_name]
