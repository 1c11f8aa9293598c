"""All settings of a run: one YAML file, one section a stage. Unknown keys are errors; `load_settings` reads them.

Argument names are those of transformers and TRL. Defaults are the papers' where a paper gives them: Safe RLHF-V
(arXiv 2503.17682) and its released code, Safe RLHF (arXiv 2310.12773). What a method, a rule of the multiplier or a
measure takes is declared by its dataclass; the sections here are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt
from pydantic import Field, model_validator

from safe_rlhf_v.arguments import Optimizer
from safe_rlhf_v.config.evaluation import EvaluationSection, GenerationSection, RefinementSection
from safe_rlhf_v.config.online import EngineSection
from safe_rlhf_v.config.pairs import DirectSection, IterativeSection, PairsSection
from safe_rlhf_v.config.policy import PolicySection
from safe_rlhf_v.config.sections import Location, Section
from safe_rlhf_v.config.supervised import (
    CostSection,
    DataSection,
    GuardSection,
    ModelSection,
    RewardSection,
    SFTSection,
    TrainSection,
)
from safe_rlhf_v.config_io import SettingsError, dump_yaml, load, walk
from safe_rlhf_v.fields import Count, Positive, Rate
from safe_rlhf_v.files import replace_text

__all__ = [
    "CostSection", "Count", "DataSection", "DirectSection", "EngineSection", "EvaluationSection", "GenerationSection",
    "GuardSection", "IterativeSection", "Location", "ModelSection", "Optimizer", "PairsSection", "PolicySection",
    "Positive", "Rate", "RefinementSection", "RewardSection", "SFTSection", "Section", "Settings", "SettingsError",
    "TrainSection", "load_settings", "walk",
]  # fmt: skip


class Settings(Section):
    output_dir: Location = Field("runs/default", description="Everything a run writes goes below this folder.")
    seed: Annotated[int, Ge(0), Lt(2**32)] = Field(0, description="Seed of weights, data order and sampling.")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sft: SFTSection = SFTSection()
    reward: RewardSection = RewardSection()
    cost: CostSection = CostSection()
    guard: GuardSection = GuardSection()
    policy: PolicySection = PolicySection()
    direct: DirectSection = DirectSection()
    iterative: IterativeSection = IterativeSection()
    refinement: RefinementSection = RefinementSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _quantized_means_adapters(self) -> Settings:
        if self.model.quantization and self.policy.roles == "separate":
            raise ValueError(f"model.quantization {self.model.quantization} needs policy.roles: adapters, not separate")
        return self

    def save(self, path: str | Path) -> None:
        """Write every setting, defaults included, as YAML that `load_settings` reads back to the same settings.

        Whole or not at all. What goes by the algorithm is null where nobody named it: who reads the file may change the
        algorithm.
        """
        replace_text(path, dump_yaml(self.as_tree()))


def load_settings(path: str | Path | None = None, overrides: Sequence[str] = (), *, section: str = "") -> Settings:
    """Settings from a YAML file (null: the defaults) with `section.key=value` overrides. Raises SettingsError.

    section: that of the stage at hand; an unknown key is looked for there first.
    """
    return load(Settings, path, overrides, section=section)
