"""Settings of training on pairs: the methods of the tables `DIRECT` and `ITERATIVE`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, MultipleOf
from pydantic import Field

from safe_rlhf_v.algorithms import DIRECT, ITERATIVE
from safe_rlhf_v.algorithms.can import Dualisation
from safe_rlhf_v.arguments import IterativeArguments
from safe_rlhf_v.config.methods import methods_of, own_values, words_of
from safe_rlhf_v.config.sections import Location, section_of
from safe_rlhf_v.config.supervised import TrainSection
from safe_rlhf_v.fields import NonNegative, Positive, Rate

if TYPE_CHECKING:
    Iteration = str
else:
    Iteration = Literal[tuple(ITERATIVE)]

SCORED = " and ".join(name for name, kind in DIRECT.items() if getattr(kind, "needs_scores", False))


class PairsSection(TrainSection):
    """Trained on pairs: direct and iterative methods."""

    ptx_coeff: NonNegative = Field(0.0, description="Weight of the cross-entropy on demonstrations beside the loss on pairs, one demonstration a pair, as policy.ptx_coeff. [ours]")
    demonstrations: Literal["all", "more_helpful", "safer", "both"] = Field("both", description="Which responses of the training pairs that term imitates; both: those preferred on both axes.")


class DirectSection(PairsSection, methods_of(DIRECT, without=("beta", "allow_contradictory"))):  # type: ignore[misc]
    """Trained on the pairs themselves, without sampling: DPO and its safe variants."""

    beta: Rate | None = Field(None, description=f"Weight of the KL to the reference; null takes the algorithm's own: {own_values(DIRECT, 'beta')}.")
    learning_rate: Rate = Field(2e-5, description="Peak learning rate. [code] 2e-5 for full weights (SACPO); adapters want about 1e-4 [ours]")
    reference: Location | None = Field(None, description="Reference model; null takes the one that training starts from.")
    reward_model: Location | None = Field(None, description=f"Folder of the reward model, for {SCORED}; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description=f"Folder of the cost model, for {SCORED}; null takes <output_dir>/cost.")


class IterativeSection(section_of(IterativeArguments, base=PairsSection, without=("output_dir",))):  # type: ignore[misc]
    """Reward is raised while cost falls by at least `bounds` below the start model's, by DPO on relabelled samples."""

    algorithm: Iteration = Field(next(iter(ITERATIVE)), description=words_of(ITERATIVE))
    bounds: float | dict[str, float] = Field(3.0, description="b: by how much the mean cost must fall below the start model's. A number, or one for each of some primary categories ('all' for every prompt). [paper] 3 to 9")
    beta: Rate = Field(0.1, description="Weight of the KL to the start model, also of DPO. [paper] 0.1")
    prompts: Positive = Field(600, description="Prompts on which multipliers and constraints are measured. [paper] 600")
    samples: Annotated[int, Ge(2)] = Field(64, description="Responses to each of them. [paper] 64")
    pair_prompts: Positive | None = Field(None, description="Prompts trained on; null takes all.")
    pair_samples: Annotated[int, Ge(2), MultipleOf(2)] = Field(2, description="Responses to each of them, compared two by two. [ours]")
    pairs_from: Literal["reference", "policy"] = Field("reference", description="Whose responses are compared: the start model's, drawn once, or those of the iteration before. [ours]")
    start_from: Literal["previous", "reference"] = Field("previous", description="Each training goes on from the policy of the one before, or starts over. [ours]")
    reward_model: Location | None = Field(None, description="Folder of the reward model; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description="Folder of the cost model; null takes <output_dir>/cost.")
    helpful_policy: Location | None = Field(None, description="For pecan and pecaid: a policy trained by DPO on more_helpful, from the same start with the same beta.")
    safe_policy: Location | None = Field(None, description="For pecan and pecaid: the same on safer.")
    num_train_epochs: Rate = Field(1.0, description="Passes over the pairs, each iteration. [paper] 1")
    learning_rate: Rate = Field(5e-4, description="Peak learning rate. [paper] 5e-4 with adapters of rank 8, alpha 16")
    max_new_tokens: Positive = Field(512, description="Longest sampled response; those that are cut off are not trained on.")
    rows_at_once: Positive = Field(64, description="Responses generated and scored together.")

    @property
    def method(self) -> Dualisation:
        """What `algorithm` names."""
        return ITERATIVE[self.algorithm]
