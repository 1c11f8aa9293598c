"""Prompts of any data set, harmful or not by their labels; the trained models say what the answers are."""

from __future__ import annotations

from collections.abc import Sequence

from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.benchmarks.base import Benchmark
from safe_rlhf_v.evaluation.judges import ModelJudge, Severities, TextScores


def benchmark(prompts: Sequence[Prompt], scorer: TextScores, guard: Severities | None = None) -> Benchmark:
    """Judged by the cost model, and with `guard` unsafe where either says so: an opinion, never the truth."""
    return Benchmark(name="labelled prompts", prompts=prompts, judge=ModelJudge(scorer, guard))
