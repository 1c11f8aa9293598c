"""Settings of dialogues with feedback, of answering and of the report."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import Field

from safe_rlhf_v.arguments import Rules, Sampling
from safe_rlhf_v.config.sections import Location, Section, section_of
from safe_rlhf_v.fields import Count, Positive


class RefinementSection(section_of(Rules)):  # type: ignore[misc]
    """Student-teacher dialogues with feedback (FIRE, NeurIPS 2024). Training itself goes by the sft section."""

    first_turns: Literal["none", "correct", "all"] = Field("correct", description="First answers that a student imitates beside its improved ones; all keeps its first answers as they are. [ours]")
    safety: Literal["oracle", "guard", "none"] = Field("oracle", description="Who tells the oracle teacher what is unsafe; none scores help alone, as the paper. [ours]")
    held_out: Annotated[float, Gt(0), Lt(1)] = Field(0.1, description="Share of the dialogues' prompts that a trained student or teacher is measured on. [ours]")


class GenerationSection(section_of(Sampling)):  # type: ignore[misc]
    batch_size: Positive = Field(8, description="Prompts a forward pass.")


class EvaluationSection(Section):
    model: Location | None = Field(None, description="Aligned model to measure; null takes <output_dir>/policy.")
    base: Location | None = Field(None, description="Model it is compared with; null takes the one the policy started from.")
    samples: Positive = Field(1, description="Responses a prompt.")
    confidence: Annotated[float, Gt(0), Lt(1)] = Field(0.95, description="Level of the intervals.")
    bootstrap: Annotated[int, Ge(100)] = Field(4000, description="Resamples of the intervals.")
    delta: Annotated[float, Gt(0), Lt(1)] = Field(0.05, description="Chance that the safety test (HC-RLHF) lets a policy pass whose mean cost is above the threshold.")
    guard_rounds: bool = Field(True, description="Also measure the guard's filter-and-regenerate loop, where there is a guard.")
    examples: Count = Field(8, description="Example prompts shown in the report.")
