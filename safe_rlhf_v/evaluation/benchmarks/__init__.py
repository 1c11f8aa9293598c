"""One evaluation set a file, each a function that makes a `Benchmark` (docs/design.md, "A benchmark")."""

from collections.abc import Sequence

from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.benchmarks import labelled, picture_world
from safe_rlhf_v.evaluation.benchmarks.base import Benchmark
from safe_rlhf_v.evaluation.judges import Severities, TextScores

__all__ = ["Benchmark", "benchmark_of"]


def benchmark_of(prompts: Sequence[Prompt], scorer: TextScores, guard: Severities | None = None) -> Benchmark:
    """The picture world's where every prompt is of it; else the prompts by their labels, judged by trained models."""
    if picture_world.recognises(prompts):
        return picture_world.benchmark(prompts)
    return labelled.benchmark(prompts, scorer, guard)
