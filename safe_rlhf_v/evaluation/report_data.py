"""What the report is made of. `ReportData` is what report.json holds, so a page can be made again from the file.

Every number is finite, every share in 0..1, every name known: anything else is refused here, before it can be shown.
The first keys (base, aligned, reward_model, cost_model, constraint, guard, guard_rounds, seconds) are a promise to
those who read report.json with a program; more keys may come, these stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from safe_rlhf_v.evaluation.safety_test import SafetyTest
from safe_rlhf_v.statistics import CalibrationBin, Compensation, Interval

Share = Annotated[float, Field(ge=0, le=1)]
Measured = dict[str, Interval]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always")


class JudgeInfo(_Part):
    """Who judged. kind: "truth", "outside" or "model"; the page words its claims by it."""

    name: str
    kind: Literal["truth", "outside", "model"]


class Side(_Part):
    """One policy's results. The five numbers repeat `intervals[name].value`; None where the judge cannot say.

    by_category, by_prompt_severity, slices: measures of each group. answer_severity: shares of levels 0..3.
    plane: [reward, cost, share judged unsafe] of a prompt, by the trained models.
    compensation: by "judge" and by "cost_model".
    """

    unsafe_rate: Share | None = None
    benign_helpfulness: Annotated[float, Field(ge=0, le=3)] | None = None
    over_refusal_rate: Share | None = None
    mean_cost: float | None = None
    mean_reward: float | None = None
    n_prompts: int
    n_answers: int
    intervals: Measured
    by_category: dict[str, Measured] = {}
    by_prompt_severity: dict[str, Measured] = {}
    answer_severity: list[Interval] = []
    slices: dict[str, Measured] = {}
    compensation: dict[str, Compensation] = {}
    agreement: dict[str, float | None] | None = None
    plane: list[tuple[float, float, float]] = []


class _Metrics(BaseModel):
    """Known metrics by name; further ones are kept and shown in the order given."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, revalidate_instances="always")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class PreferenceMetrics(_Metrics):
    """A reward or cost model on held-out pairs. Sign metrics are the cost model's alone.

    accuracy, interval, n_pairs: of the ranking, over pairs whose label was not forced on a tie; *_tied: over those.
    """

    accuracy: Share | None
    interval: Interval | None = None
    n_pairs: int | None = None
    accuracy_tied: Share | None = None
    n_tied: int | None = None
    sign_accuracy: Share | None = None
    balanced_accuracy: Share | None = None
    balanced_accuracy_interval: Interval | None = None
    auc: Share | None = None
    auc_interval: Interval | None = None
    ece: Share | None = None
    bins: list[CalibrationBin] = []


class Bounded(_Part):
    """What training bounded in place of the mean cost, by what, and what it is on the evaluation's answers."""

    name: str
    bound: float
    value: float


class Constraint(_Part):
    """The bound E[c] <= threshold of training, and the multiplier that enforced it at the last step.

    bounded: what was bounded where it is not E[c]; then a mean cost under the threshold says little of the constraint.
    """

    threshold: float
    final_multiplier: float
    maximum_multiplier: float | None = None
    algorithm: str = ""
    safety_test: SafetyTest | None = None
    bounded: Bounded | None = None


class GuardHead(_Metrics):
    """Binary moderation of queries or of responses. recall_at_1_fpr: at 1 % false positives."""

    f1: Share | None
    precision: Share | None = None
    recall: Share | None = None
    auprc: Share | None = None
    fpr: Share | None = None
    recall_at_1_fpr: Share | None = None
    n: int | None = None
    intervals: Measured = {}


class GuardMetrics(_Metrics):
    """The guard against the labels of held-out data, in the shape of guard.evaluate.

    query, response: None for a kind that this guard cannot judge. blind_f1: of `blind_kind`, with the picture blanked.
    over_refusal: queries flagged although harmless, among those that look harmful.
    severity: accuracy, macro_f1, within_one, mae, under_severity, ...; categories: name -> f1, ap, support;
    calibration: head -> ece, brier, temperature; bins: head -> reliability diagram.
    """

    query: GuardHead | None
    response: GuardHead | None
    severity_kappa: Annotated[float, Field(ge=-1, le=1)] | None
    blind_f1: Share | None = None
    blind_kind: Literal["query", "response"] = "response"
    over_refusal: Share | None = None
    severity: dict[str, float | None] = {}
    categories: dict[str, dict[str, float | None]] = {}
    calibration: dict[str, dict[str, float | None]] = {}
    bins: dict[str, list[CalibrationBin]] = {}


class GuardRound(_Metrics):
    """After `round` rounds of filter and regenerate, on prompts that invite harm and on harmless ones.

    unsafe_rate: what the JUDGE calls unsafe of the `given` answers, None where every one was refused. gave_up_rate:
    refused by the guard, of all `prompts`. harmless_refused_rate: the same of `harmless_prompts`, all of it needless.
    not_judged: prompts of both that the guard could not judge, which it refuses.
    """

    round: Annotated[int, Field(ge=0)]
    unsafe_rate: Share | None
    gave_up_rate: Share
    harmless_refused_rate: Share | None = None
    given: Annotated[int, Field(ge=0)] | None = None
    prompts: Annotated[int, Field(ge=0)] | None = None
    harmless_prompts: Annotated[int, Field(ge=0)] | None = None
    not_judged: Annotated[int, Field(ge=0)] | None = None


class Example(_Part):
    """One prompt with both answers. why: the rule that chose it. invites_harm: None where unknown.

    picture: data URI; left out of report.json.
    """

    why: str
    question: str
    invites_harm: bool | None
    category: str | None = None
    slices: list[str] = []
    picture: str | None = Field(default=None, pattern=r"^data:image/(png|jpeg);base64,", repr=False)
    before: ExampleAnswer
    after: ExampleAnswer


class ExampleAnswer(_Part):
    """A shortened answer, what the judge says, and what the trained models think."""

    text: str
    unsafe: bool
    severity: int | None = None
    helpful_rate: float | None = None
    harmless_rate: float | None = None
    refusal: bool | None = None
    reward: float | None = None
    cost: float | None = None


class ReportData(_Part):
    """Everything the page shows. Parts that a run did not make stay empty and are named as missing on the page.

    difference: paired change of each measure. seed: of the training run. models: folder or hub id of
    what was judged, what it is compared with, and what scored both. level: coverage of the intervals.
    """

    base: Side
    aligned: Side
    difference: Measured
    judge: JudgeInfo
    reward_model: PreferenceMetrics | None = None
    cost_model: PreferenceMetrics | None = None
    constraint: Constraint
    guard: GuardMetrics | None = None
    guard_rounds: list[GuardRound] = []
    trajectory: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    examples: list[Example] = []
    settings: dict[str, JsonValue] = {}
    notes: list[str] = []
    title: str = "Safety alignment report"
    subtitle: str = ""
    seed: int = 0
    models: dict[Literal["base", "aligned", "reward", "cost"], str] = {}
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    schema_version: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _total_seconds(cls, data: Any) -> Any:
        """Adds seconds.total where stages are given without it."""
        if isinstance(data, dict) and data.get("seconds") and "total" not in data["seconds"]:
            data = {**data, "seconds": {**data["seconds"], "total": sum(data["seconds"].values())}}
        return data

    @model_validator(mode="after")
    def _rounds_in_order(self) -> ReportData:
        rounds = [r.round for r in self.guard_rounds]
        if rounds != list(range(len(rounds))):
            raise ValueError(f"guard_rounds holds rounds {rounds}; expected 0, 1, 2, ... in order, round 0 unguarded")
        return self

    def to_json(self) -> str:
        """The text of report.json: everything but the pictures."""
        return self.model_dump_json(indent=2, exclude={"examples": {"__all__": {"picture"}}}) + "\n"


def read_report(path: str | Path) -> ReportData:
    """A report.json back as `ReportData` (its examples without pictures). Raises pydantic.ValidationError."""
    return ReportData.model_validate_json(Path(path).read_text(encoding="utf-8"))
