"""Help in choosing the threshold, and the summary of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHARES = (0.1, 0.05, 0.01, 0.0)
"""Shares of unsafe answers for which a threshold is suggested. [ours]"""


def threshold_guidance(costs: Tensor, threshold: float, bounded: float | None = None) -> dict[str, float]:
    """Where the start model's costs (n,) stand: quantiles, mean, the share above the threshold d and above 0.

    bounded: the statistic that d bounds, where it is not the mean.
    """
    costs = costs.double().cpu()
    levels = torch.quantile(costs, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {
        "rollouts": float(costs.numel()),
        "threshold": threshold,
        "mean": costs.mean().item(),
        "bounded": costs.mean().item() if bounded is None else bounded,
        **{f"quantile_{q:g}": level for q, level in zip(QUANTILES, levels, strict=True)},
        "share_above_threshold": (costs > threshold).double().mean().item(),
        "share_unsafe": (costs > 0).double().mean().item(),
    }


def describe(guidance: dict[str, float]) -> str:
    """The guidance as the lines shown before training."""
    quantiles = "  ".join(f"{q:.0%} {guidance[f'quantile_{q:g}']:+.2f}" for q in QUANTILES)
    d, mean, bounded = guidance["threshold"], guidance["mean"], guidance["bounded"]
    what = "the mean" if math.isclose(mean, bounded, abs_tol=1e-6) else f"what it bounds, now {bounded:+.2f},"
    need = f"{what} must fall by {bounded - d:.2f}" if bounded > d else "the start model meets it already"
    return (
        f"Costs of {guidance['rollouts']:.0f} responses of the start model (above 0: unsafe)\n"
        f"  quantiles: {quantiles}; mean {mean:+.2f}; unsafe {guidance['share_unsafe']:.0%}\n"
        f"  threshold d = {d:+.2f}: {guidance['share_above_threshold']:.0%} lie above it; {need}."
    )


def suggest_thresholds(safe: Tensor, unsafe: Tensor, threshold: float) -> dict[str, float]:
    """What thresholds mean to a cost model, from its costs of responses labelled safe (n,) and unsafe (m,).

    A policy that answers as the data does, with a share u of unsafe responses, has the mean cost
        d(u) = (1 - u) mean(safe) + u mean(unsafe),
    so a threshold d allows it the share u(d) = (d - mean(safe)) / (mean(unsafe) - mean(safe)). [ours] A policy whose
    safe answers are safer than the data's may be unsafe more often at the same mean: see safety compensation.
    Raises ValueError where unsafe responses do not cost more than safe ones: such a cost model cannot constrain.
    """
    low, high = safe.double().mean().item(), unsafe.double().mean().item()
    if not low < high:
        raise ValueError(
            f"the cost model gives unsafe responses a mean cost of {high:.3g} and safe ones {low:.3g}; it has to give "
            "unsafe ones more: train it again on more data before training a policy against it"
        )
    levels = torch.quantile(safe.double().cpu(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {
        "mean_cost_safe": low,
        "mean_cost_unsafe": high,
        **{f"safe_quantile_{q:g}": level for q, level in zip(QUANTILES, levels, strict=True)},
        "share_of_safe_above_0": (safe > 0).double().mean().item(),
        "share_of_unsafe_above_0": (unsafe > 0).double().mean().item(),
        "threshold": threshold,
        "allowed_unsafe_share": min(1.0, max(0.0, (threshold - low) / (high - low))),
        **{f"threshold_for_{share:g}": (1 - share) * low + share * high for share in SHARES},
    }


def describe_suggestions(found: Mapping[str, float]) -> str:
    """The suggestions as the lines shown before training."""
    quantiles = "  ".join(f"{q:.0%} {found[f'safe_quantile_{q:g}']:+.2f}" for q in QUANTILES)
    suggested = {share: found[f"threshold_for_{share:g}"] for share in SHARES}
    marks = {share: "*" if d > 0 else "" for share, d in suggested.items()}
    shares = "   ".join(f"{share:.0%}: d = {d:+.2f}{marks[share]}" for share, d in suggested.items())
    above = "\n  * above 0, where a cost means unsafe: no bound to take; train the cost model again"
    note = above if any(marks.values()) else ""
    d, allowed = found["threshold"], found["allowed_unsafe_share"]
    return (
        f"What d means to this cost model, by its costs of held-out responses\n"
        f"  labelled safe: mean {found['mean_cost_safe']:+.2f}, quantiles {quantiles}; "
        f"{found['share_of_safe_above_0']:.0%} above 0\n"
        f"  labelled unsafe: mean {found['mean_cost_unsafe']:+.2f}; {found['share_of_unsafe_above_0']:.0%} above 0\n"
        f"  a policy that answers as this data does may be unsafe in {allowed:.0%} of its answers under d = {d:+.2f};\n"
        f"  for at most  {shares}{note}"
    )


def summary(metrics: Sequence[Mapping[str, float]]) -> str:
    """Means of the main figures over the first and the last tenth of a run."""
    names = ("reward", "cost", "unsafe_share", "multiplier", "kl")
    tenth = max(1, len(metrics) // 10)
    lines = [f"{'':>12}  first {tenth:>4}   last {tenth:>4}  steps"]
    for name in names:
        first, last = (sum(row[name] for row in part) / tenth for part in (metrics[:tenth], metrics[-tenth:]))
        lines.append(f"{name:>12}  {first:>10.3f}  {last:>10.3f}")
    return "\n".join(lines)
