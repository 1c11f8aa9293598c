"""Measure one run of a comparison.

Reads the folder's run.yaml and plan.json, answers every evaluation prompt `evaluation.samples` times, has the answers
judged (by the picture world's oracle where the data is of that world) and scored by the reward and cost model, and
writes answers.parquet, measured.json and left_out.jsonl, the prompts that are not answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from safe_rlhf_v.comparison.runs import RUN_FIELDS, answer_table
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.evaluation.benchmarks import benchmark_of
from safe_rlhf_v.evaluation.run import collect
from safe_rlhf_v.files import replacing
from safe_rlhf_v.stages.answering import Answering, Scoring
from safe_rlhf_v.stages.data import comparisons
from safe_rlhf_v.stages.folder import read_done, write_json
from safe_rlhf_v.training.encode import dropped, encodable, thorough, write_left_out


def measure(folder: Path) -> None:
    """Writes answers.parquet, then measured.json; a run whose stage made no model is written down as such."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    settings = load_settings(folder / "run.yaml")
    data = comparisons(settings.data, "evaluation")
    models = str(settings.policy.reward_model), str(settings.policy.cost_model)
    scorer = Scoring(*models, settings.model, settings.generation.batch_size)
    benchmark = benchmark_of(data.prompts(), scorer)
    found = Path(plan["model"], "config.json").is_file() or not Path(plan["model"]).is_dir()
    if found:
        policy = Answering(plan["model"], settings.model, settings.generation)
        prompts, left_out = encodable(benchmark.prompts, thorough(policy.encoder), data)
        write_left_out(folder / "left_out.jsonl", dropped(data) + left_out)
        torch.manual_seed(settings.seed)
        batch, samples = policy.batch_size, settings.evaluation.samples
        answers = collect(
            policy, replace(benchmark, prompts=prompts), samples, scorer=scorer, batch_size=batch, label=str(folder)
        )
        _write_answers(answer_table(answers, benchmark.invites_harm), folder)
    known = {key: value for key, value in plan.items() if key in RUN_FIELDS}
    judge = benchmark.judge
    known |= {"judge": judge.name, "judge_kind": judge.kind, "found": found, "identity": plan["identity"]}
    write_json(folder / "measured.json", known | effort(getattr(settings, plan["stage"], None), folder, plan["stage"]))


def _write_answers(table: pa.Table, folder: Path) -> None:
    """answers.parquet, whole or not at all; what was measured of other answers goes first."""
    (folder / "measured.json").unlink(missing_ok=True)
    with replacing(folder / "answers.parquet") as beside:
        pq.write_table(table, beside)


def effort(section: Any, folder: Path, stage: str) -> dict[str, Any]:
    """What a training took: seconds, steps, responses drawn, pairs read. section: the stage's settings.

    Seconds: of every step that counts, also where a run was killed and went on; a direct method's are those of its last
    attempt.
    """
    done, rows = read_done(folder / stage) if stage else None, stage_metrics(folder, stage)
    if done is None:
        return {}
    measured = done["measured"]
    logged = [row["seconds"] for row in rows if isinstance(row.get("seconds"), int | float)]
    result: dict[str, Any] = {"seconds": round(sum(logged), 1) if logged else done["seconds"]}
    if stage == "policy":
        result["steps"] = int(measured["steps"])
        result["sampled"] = result["steps"] * section.per_device_train_batch_size * section.num_generations
    elif stage == "iterative":
        result["steps"], result["sampled"] = int(measured["iterations"]), _sampled(section, measured)
    else:
        result |= _direct_effort(section, measured)
    return result


def _direct_effort(section: Any, measured: Mapping[str, Any]) -> dict[str, int]:
    """Steps and pairs of a training on pairs, of both where it has two (SACPO); what C-DPO draws for its multiplier."""
    parts = [part for part in measured.values() if isinstance(part, Mapping) and "train_rows" in part] or [measured]
    steps = sum(int(part.get("steps", 0)) for part in parts)
    rows = section.per_device_train_batch_size * section.gradient_accumulation_steps
    passes = [round(part.get("train_rows", 0) * section.num_train_epochs) for part in parts]
    found = {"steps": steps, "pairs": steps * rows if section.max_steps > 0 else sum(passes)}
    if hasattr(getattr(section, "method", None), "dual_prompts"):  # it draws answers for its multiplier
        method = section.made()
        found["sampled"] = steps // method.dual_steps * method.dual_prompts
    return found


def _sampled(section: Any, measured: dict[str, Any]) -> int:
    """Responses that iterative dualisation drew: for the first multipliers, for each measurement, for the pairs."""
    iterations = int(measured["iterations"])
    pairs = int(section.pair_samples) * int(section.pair_prompts or measured["prompts"])
    drawn = iterations if section.pairs_from == "policy" else 1
    return int(section.prompts) * int(section.samples) * (iterations + 1) + pairs * drawn


def stage_metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Rows of the stage's metrics.jsonl."""
    file = folder / stage / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if stage and file.is_file() else []
    )
