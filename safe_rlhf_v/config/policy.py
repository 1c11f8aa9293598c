"""Settings of the policy: a method of the table `ONLINE`, its constraint, and the online loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt, Lt
from pydantic import Field, model_validator

from safe_rlhf_v import duals
from safe_rlhf_v.algorithms import ONLINE
from safe_rlhf_v.arguments import OnlineArguments
from safe_rlhf_v.config.constraint import DualSection, MeasureSection
from safe_rlhf_v.config.methods import methods_of, own_values
from safe_rlhf_v.config.online import EngineSection, OnlineSettings
from safe_rlhf_v.config.sections import Location, default_of
from safe_rlhf_v.fields import Count, NonNegative, Positive

if TYPE_CHECKING:
    from safe_rlhf_v.constraint import Constraint
    from safe_rlhf_v.duals import Dual


class ConstrainedSection(methods_of(ONLINE, without=("beta", "threshold"))):  # type: ignore[misc]
    """Which method, and what it is bound by."""

    measure: MeasureSection = Field(MeasureSection(), description="Of what the threshold is a bound.")
    dual: DualSection = Field(DualSection(), description="How the multiplier moves.")
    roles: Literal["adapters", "separate"] = Field("adapters", description="adapters: all six roles on one backbone; separate: full models.")
    reward_model: Location | None = Field(None, description="Folder of the reward model; null takes <output_dir>/reward.")
    cost_model: Location | None = Field(None, description="Folder of the cost model; null takes <output_dir>/cost.")
    threshold: float | Literal["auto"] = Field(default_of(next(iter(ONLINE.values())), "threshold"), description="Bound d on the mean cost. auto: the mean cost of the training data's responses labelled safe. [code] -0.5")
    threshold_quantile: Annotated[float, Gt(0), Lt(1)] | None = Field(None, description="With threshold auto: this quantile of those costs in place of their mean; the lower, the stricter. [ours]")
    beta: NonNegative | None = Field(None, description=f"Weight of the KL penalty to the start model; null takes the algorithm's own: {own_values(ONLINE, 'beta')}.")


class PolicySection(OnlineSettings, ConstrainedSection):  # type: ignore[misc]
    """Reward is raised while the mean cost is kept at or under `threshold`."""

    demonstrations: Literal["all", "more_helpful", "safer", "both"] | None = Field(None, description="Which responses of the training pairs the ptx term imitates; both: those preferred on both axes; null takes sft.responses.")
    bf16: bool = Field(False, description="Compute in bfloat16 over float32 weights; for weights that are bfloat16 themselves, see model.dtype.")
    gradient_checkpointing: bool = Field(False, description="Recompute the language model's activations in the backward pass: less memory, a third slower. The frozen vision tower keeps none.")
    torch_compile: bool = Field(False, description="Compile the language model's layers with torch.compile; slow at first. Needs triton on a GPU, a C++ compiler on a CPU.")
    use_liger_kernel: bool = Field(False, description="Liger's fused kernels for norms, MLPs and rotary positions. Needs liger-kernel and a GPU.")
    vision_cache_mb: Count = Field(0, description="Megabytes of image features kept between rollouts; 0 encodes each rollout's pictures once.")
    engine: EngineSection = Field(EngineSection(), description="What draws the responses of rollouts.")
    multiplier_patience: Positive = Field(50, description="Rollouts the multiplier may stand at its maximum before a warning.")

    @model_validator(mode="after")
    def _own_dual(self) -> PolicySection:
        own = self.made().own_dual(self.dual.named())
        self.__dict__["dual"] = self.dual.with_own(own)  # not by assignment, which would validate again
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> PolicySection:
        if self.engine.kind == "vllm" and self.roles == "separate":
            raise ValueError("engine.kind vllm needs roles: adapters: it is sent the policy's adapter, not its weights")
        if self.method.needs_demonstrations and not self.ptx_coeff:
            raise ValueError(f"algorithm {self.algorithm} learns from demonstrations alone: set ptx_coeff above 0")
        chosen = f"algorithm {self.algorithm}, dual.kind {self.dual.kind} and measure.kind {self.measure.kind}"
        try:
            self.made().check(self.rule(), self.measure.made())
            least = max(self.method.samples, self.constraint().measure.samples)
        except ValueError as error:
            raise ValueError(f"{chosen} do not go together: {error}") from None
        if self.num_generations < least:
            raise ValueError(f"num_generations must be at least {least} for algorithm {self.algorithm} as it is set, not {self.num_generations}")
        return self

    @property
    def takes_threshold(self) -> bool:
        """Whether `threshold` bounds what the algorithm bounds; else it has a bound of its own, on every prompt."""
        return default_of(self.method, "threshold") is not None

    def rule(self) -> Dual:
        """The multiplier's rule; for an algorithm without a multiplier, one that stays at 0."""
        return self.dual.made() if self.method.has_multiplier else duals.fixed(0.0)  # type: ignore[no-any-return]

    def constraint(self, threshold: float | None = None) -> Constraint:
        """That of the algorithm, with its multiplier's rule and its measure, for one run. None: the algorithm's own."""
        made = self.made(threshold=threshold)
        return made.constraint(self.rule(), self.measure.made(), self.multiplier_patience)  # type: ignore[no-any-return]

    def arguments(self, output_dir: Path, seed: int) -> OnlineArguments:
        """The online loop's."""
        own = {name: getattr(self, name) for name in OnlineSettings.model_fields}
        return OnlineArguments(**own, output_dir=output_dir, seed=seed)
