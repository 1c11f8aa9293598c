"""The tables of a comparison: results.parquet, a row a run, and results_by_prompt.parquet, a row a run and prompt."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from safe_rlhf_v.comparison.comparison import FIGURES, Comparison, compensations
from safe_rlhf_v.comparison.runs import final_multiplier

RENAMED = {
    "requested": "requested_cost_reduction",
    "achieved": "achieved_cost_reduction",
    "swept": "only_in_sweep",
    "seconds": "training_seconds",
    "sampled": "responses_sampled",
    "pairs": "preference_pairs_used",
    "steps": "training_steps",
    "found": "solution_found",
    "cvar": "cvar_of_cost_worst_tenth",
}


def result_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each method x seed x bound, the reference first: what it cost and what it measured."""
    rows = []
    for run in (comparison.reference, *comparison.runs):
        row: dict[str, Any] = asdict(run.info)
        row["final_multiplier"] = final_multiplier(run)
        if run.info.found:
            row["achieved"] = float((comparison.reference.columns["cost"] - run.columns["cost"]).mean())
            for name, figure in FIGURES.items():
                values = figure.value(run)[comparison.chosen(name)]
                row[name] = float(values.mean()) if values.size and np.isfinite(values).all() else None
            extra = compensations([run]) or {}
            row |= {name: extra.get(name) for name in ("compensated_mass", "cvar")}
        rows.append({RENAMED.get(name, name): value for name, value in row.items()})
    return rows


def prompt_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each run and prompt: the means over its answers."""
    rows = []
    for run in (comparison.reference, *comparison.runs):
        shared = {"method": run.info.method, "seed": run.info.seed, "requested_cost_reduction": run.info.requested}
        shared["only_in_sweep"] = run.info.swept
        for i, prompt in enumerate(run.prompts if run.info.found else ()):
            rows.append({**shared, "prompt_id": prompt, **{name: float(v[i]) for name, v in run.columns.items()}})
    return rows


def write_results(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """results.parquet and results_by_prompt.parquet; returns both paths."""
    paths = folder / "results.parquet", folder / "results_by_prompt.parquet"
    for path, rows in zip(paths, (result_rows(comparison), prompt_rows(comparison)), strict=True):
        names = list({name: None for row in rows for name in row})
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        empty = {name for name in names if pa.types.is_null(table.schema.field(name).type)}
        kinds = [(f.name, pa.float64() if f.name in empty else f.type) for f in table.schema]
        pq.write_table(table.cast(pa.schema(kinds)), path)
    return paths
