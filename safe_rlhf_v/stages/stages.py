"""The stages of a run. A stage writes to <output_dir>/<stage>, is skipped once it is done, and goes on from its newest
checkpoint where it was killed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from safe_rlhf_v.config import Settings
from safe_rlhf_v.stages import iterative, policy, supervised
from safe_rlhf_v.stages.card import Card
from safe_rlhf_v.stages.stage import Forward, Plan, Stage


def _stage(name: str, plan: Callable[[Settings], Plan], memory: Forward | None, purpose: str, limits: str) -> Stage:
    """A stage with a section of its own name."""
    card = Card(kind=name, purpose=purpose, limits=limits)
    return Stage(name=name, sections=(name,), plan=plan, card=card, memory=memory)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage(
            "sft",
            supervised.sft,
            Forward(loss="logps"),
            "A vision-language model fine-tuned to imitate responses of a preference data set.",
            "Imitation keeps what the responses hold, the unsafe ones included where they were picked.",
        ),
        _stage(
            "reward",
            partial(supervised.preference, "reward"),
            Forward(loss="score", pairs=True),
            "Scores how helpful a response to a prompt with pictures is, safety ignored. Higher is more helpful.",
            "It says nothing of safety, and is only trustworthy on data like that it was trained on.",
        ),
        _stage(
            "cost",
            partial(supervised.preference, "cost"),
            Forward(loss="score", pairs=True),
            "Scores how harmful a response to a prompt with pictures is. Above 0 is unsafe; higher is worse.",
            "Its zero is calibrated on the training data; measure sign accuracy on your own before relying on it.",
        ),
        _stage(
            "guard",
            supervised.guard,
            Forward(loss="score"),
            "Judges queries and responses with pictures: unsafe or not, category, severity.",
            "Measure it on your own traffic before relying on it; it will miss what its training data lacks.",
        ),
        _stage(
            "policy",
            policy.policy,
            None,
            "A vision-language model trained to raise reward while its mean cost is held at or under a bound.",
            "The bound holds for the cost model's mean on prompts like those trained on, not for every response.",
        ),
        _stage(
            "direct",
            supervised.direct,
            Forward(loss="logps", pairs=True),
            "A vision-language model trained on preference pairs directly, without reinforcement learning.",
            "It was never sampled in training (C-DPO apart): measure its own answers before relying on them.",
        ),
        _stage(
            "iterative",
            iterative.iterative,
            Forward(loss="logps", pairs=True, scorers=True),
            "A vision-language model trained to raise reward while its cost falls by a given amount.",
            "The improvement is the cost model's, a mean over prompts like those trained on, not each response's.",
        ),
    )
}
