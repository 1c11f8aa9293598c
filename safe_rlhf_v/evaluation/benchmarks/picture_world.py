"""The picture world: its oracle knows the truth of every answer, and each prompt how it was held out of training."""

from __future__ import annotations

from collections.abc import Sequence

from beavertails_v.picture_world import Oracle, invites_harm, slices_of
from beavertails_v.schema import Prompt
from safe_rlhf_v.evaluation.benchmarks.base import Benchmark
from safe_rlhf_v.evaluation.judges import OracleJudge


def recognises(prompts: Sequence[Prompt]) -> bool:
    """Whether every prompt carries the facts of the world that its truth follows from."""
    return all("picture_world" in prompt.meta for prompt in prompts)


def benchmark(prompts: Sequence[Prompt]) -> Benchmark:
    return Benchmark(
        name="picture world", prompts=prompts, judge=OracleJudge(Oracle()), invites_harm=invites_harm, slices=slices_of
    )
