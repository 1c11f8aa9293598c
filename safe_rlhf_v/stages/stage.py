"""What a stage of a run is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safe_rlhf_v.config import Settings
from safe_rlhf_v.stages.card import Card
from safe_rlhf_v.stages.folder import StageResult, run_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A stage made ready by the settings. inputs: the folders that it reads, by the names stage.json has for them."""

    work: Callable[[Path], StageResult]
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One training step of a supervised stage, for the prediction of its memory.

    pairs: a row of the data is two rows of a forward. loss: what is computed of them. scorers: the start, reward and
    cost model stand beside what is trained while it samples.
    """

    loss: Literal["logps", "score"]
    pairs: bool = False
    scorers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: `plan` says what is missing before anything is read, the plan's work does it.

    name: of its command and its folder. sections: those of the settings that the result depends on, beside model, data
    and seed. memory: how much it takes goes by this step; None for the policy, whose rollouts are predicted apart.
    """

    name: str
    sections: tuple[str, ...]
    plan: Callable[[Settings], Plan]
    card: Card
    memory: Forward | None

    def run(self, settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
        """Do it unless it is done, below settings.output_dir; returns what it measured. Raises as `run_stage`."""
        plan = self.plan(settings)
        return run_stage(
            self.name, settings, self.sections, plan.work, card=self.card, overwrite=overwrite, **plan.inputs
        )
