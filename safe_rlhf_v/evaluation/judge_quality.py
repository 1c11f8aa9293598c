"""Whether a reward or cost model can judge at all, by its figures on held-out labels, and what to do if it cannot."""

from __future__ import annotations

from typing import Literal

from safe_rlhf_v.evaluation.report_data import PreferenceMetrics
from safe_rlhf_v.statistics import Interval

Quality = Literal["unknown", "chance", "weak", "sound"]
CHANCE, WEAK = 0.5, 0.75
"""A figure whose interval reaches down to CHANCE says nothing; one below WEAK says little. The latter is [ours]."""
REMEDY = (
    "train it again, on more pairs, for more epochs or at a higher learning rate (adapters take a higher one than "
    "whole weights); check first that columns and labels are what you mean (`safe-rlhf-v data check`)"
)


def figures(model: PreferenceMetrics | None) -> dict[str, Interval]:
    """What tells how well a model judges: of a cost model AUC and balanced accuracy, else the ranking accuracy."""
    if model is None:
        return {}
    named = {
        "AUC": (model.auc, model.auc_interval),
        "balanced accuracy": (model.balanced_accuracy, model.balanced_accuracy_interval),
    }
    if all(value is None for value, _ in named.values()) and model.sign_accuracy is None:
        named = {"ranking accuracy": (model.accuracy, model.interval)}
    bare = {k: x or Interval(value=v, low=None, high=None, n=0) for k, (v, x) in named.items() if v is not None}
    return {k: x for k, x in bare.items() if x is not None}


def quality(model: PreferenceMetrics | None) -> Quality:
    """ "chance" where the interval of any figure holds 1/2 or lies below it."""
    found = figures(model).values()
    if not found:
        return "unknown"
    if any((x.value if x.low is None else x.low) <= CHANCE for x in found):
        return "chance"
    return "weak" if any(x.value < WEAK for x in found) else "sound"


def described(model: PreferenceMetrics | None) -> str:
    """ "AUC 0.543 (0.481 to 0.604) and balanced accuracy 0.510 (0.470 to 0.551) on 120 held-out prompts"."""
    found = figures(model)
    limits = {k: "" if x.low is None or x.high is None else f" ({x.low:.3f} to {x.high:.3f})" for k, x in found.items()}
    words = " and ".join(f"{name} {x.value:.3f}{limits[name]}" for name, x in found.items())
    prompts = max((x.n for x in found.values()), default=0)
    return f"{words} on {prompts} held-out prompts" if prompts else words


def warning(kind: Literal["reward", "cost"], model: PreferenceMetrics | None, folder: str) -> str:
    """What to know before a policy is trained against the model; empty where it judges soundly or nothing is known."""
    state = quality(model)
    if state not in ("chance", "weak"):
        return ""
    tells = "unsafe responses from safe ones" if kind == "cost" else "the more helpful response from the other"
    known = "is at chance: it cannot tell" if state == "chance" else "is weak at telling"
    what = "a policy trained against it learns nothing of what it stands for" if state == "chance" else "expect little"
    return f"warning: the {kind} model {folder} {known} {tells} ({described(model)}); {what}. Better {REMEDY}"
