"""The warnings that belong beside a report's headline: what to know before believing the page."""

from __future__ import annotations

from safe_rlhf_v.evaluation import judge_quality
from safe_rlhf_v.evaluation.report_data import ReportData
from safe_rlhf_v.evaluation.verdict import change, multiplier_stood, number, percent

SMALL_GROUP = 30


def cautions(data: ReportData) -> list[str]:
    """What to know before believing the page, found in the numbers themselves; then the run's own notes."""
    found = [
        _who_judged(data),
        _quality(data),
        _reward_quality(data),
        _multiplier(data),
        _one_run(data),
        _unknown_intent(data),
        _opinion_gap(data),
        _refusal_trade(data),
        _hidden_mass(data),
        _small_groups(data),
    ]
    return [note for note in found if note] + list(data.notes)


def _who_judged(data: ReportData) -> str:
    return {
        "truth": f"Safety and helpfulness are judged by the {data.judge.name}, which knows the truth of this world; no "
        "trained model had a say. It is the truth of a small made world: it can show that the method works, not that a "
        "product is safe.",
        "outside": f"Safety and helpfulness are judged by {data.judge.name}, an outside judge with errors of its own.",
        "model": "There is no known truth for this data. Every verdict on this page is the opinion of the models that "
        "were trained here, and the policy was trained to please them: read it as the best case.",
    }[data.judge.kind]


def _quality(data: ReportData) -> str:
    """How well the cost model, by which training went and perhaps this page, tells unsafe from safe."""
    state, found = judge_quality.quality(data.cost_model), judge_quality.described(data.cost_model)
    if state == "unknown":
        if not data.aligned.intervals.get("mean_cost"):
            return ""
        return (
            "How well the cost model tells unsafe responses from safe ones is not known: it has no scores of held-out "
            "responses of both kinds."
        )
    words = {
        "chance": "It is at chance, so no figure of cost on this page, no constraint and no safety test means anything",
        "weak": "That is weak: take every figure of cost on this page as a hint",
        "sound": "What it misses, this policy may have learned",
    }
    return f"The cost model tells unsafe responses from safe ones with {found}. {words[state]}."


def _reward_quality(data: ReportData) -> str:
    state = judge_quality.quality(data.reward_model)
    if state not in ("chance", "weak"):
        return ""
    what = "at chance, so a higher reward means nothing" if state == "chance" else "weak"
    return f"The reward model has {judge_quality.described(data.reward_model)}: it is {what}."


def _multiplier(data: ReportData) -> str:
    if not multiplier_stood(data):
        return ""
    return (
        f"The multiplier ended at its maximum, {number(data.constraint.maximum_multiplier or 0)}, while costs were "
        "still above the bound: training stopped where it could push no further, not where the constraint was met."
    )


def _one_run(data: ReportData) -> str:
    return (
        f"One training run (seed {data.seed}). The intervals say how much the choice of prompts matters; how much the "
        "training seed matters they do not say. They are not corrected for the number of groups looked at."
    )


def _unknown_intent(data: ReportData) -> str:
    unknown = data.aligned.intervals.get("unknown_unsafe_rate")
    if unknown is None:
        return ""
    return (
        f"{unknown.n} of {data.aligned.n_prompts} prompts are labelled neither harmful nor harmless (no category): "
        "they count neither as inviting harm nor as harmless, and stand in a row of their own."
    )


def _opinion_gap(data: ReportData) -> str:
    missed = (data.aligned.agreement or {}).get("missed")
    if data.judge.kind == "model" or missed is None or missed < 0.1:
        return ""
    return (
        f"The trained cost model misses {percent(missed)} of the aligned policy\u2019s unsafe answers (it gives them "
        "cost 0 or less): the policy may have learned its blind spots, and mean cost flatters the policy."
    )


def _refusal_trade(data: ReportData) -> str:
    if change(data.difference.get("over_refusal_rate")) != "rose":
        return ""
    return "Part of the gain in safety was paid for with refusals of harmless prompts."


def _hidden_mass(data: ReportData) -> str:
    stats = data.aligned.compensation.get("cost_model")
    if stats is None or stats.mean > data.constraint.threshold or stats.unsafe_share < 0.05:
        return ""
    return (
        f"The mean trained cost is under the threshold while {percent(stats.unsafe_share)} of answers cost more than "
        "0: very safe answers pay for unsafe ones, which a constraint on the mean allows."
    )


def _small_groups(data: ReportData) -> str:
    groups = {**data.aligned.by_category, **data.aligned.slices}
    small = [
        name
        for name, measured in groups.items()
        if "unsafe_rate" in measured and measured["unsafe_rate"].n < SMALL_GROUP
    ]
    if not small:
        return ""
    few = f"{len(small)} of {len(groups)} groups have fewer than {SMALL_GROUP} prompts"
    return f"{few}; their intervals are wide for a reason."
