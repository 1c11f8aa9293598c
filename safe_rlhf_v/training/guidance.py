"""Help in choosing the threshold, and a warning when the constraint looks out of reach."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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


@dataclass
class BoundWatch:
    """Counts the steps in a row at which the multiplier stands at its maximum."""

    maximum: float
    patience: int
    steps: int = 0

    def see(self, multiplier: float, violation: float, step: int) -> None:
        """Warn each time `patience` steps have passed at the maximum without meeting the constraint."""
        at_bound = math.isfinite(self.maximum) and multiplier >= self.maximum and violation > 0
        self.steps = self.steps + 1 if at_bound else 0
        if self.steps and self.steps % self.patience == 0:
            log.warning(
                "step %d: the multiplier has stood at its maximum %g for %d steps and the costs still violate the "
                "constraint by %.3g; it may be infeasible for this model. Raise the threshold or the maximum, train "
                "longer, or lower beta.",
                step, self.maximum, self.steps, violation,
            )  # fmt: skip


def summary(metrics: Sequence[Mapping[str, float]]) -> str:
    """Means of the main figures over the first and the last tenth of a run."""
    names = ("reward", "cost", "unsafe_share", "multiplier", "kl")
    tenth = max(1, len(metrics) // 10)
    lines = [f"{'':>12}  first {tenth:>4}   last {tenth:>4}  steps"]
    for name in names:
        first, last = (sum(row[name] for row in part) / tenth for part in (metrics[:tenth], metrics[-tenth:]))
        lines.append(f"{name:>12}  {first:>10.3f}  {last:>10.3f}")
    return "\n".join(lines)
