"""How well a reward or cost model orders held-out pairs and, for costs, tells safe from unsafe. N pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def _mean(values: Tensor) -> float | None:
    """Mean, or None of nothing: a share of no pairs is unknown, not 0."""
    return values.double().mean().item() if values.numel() else None


def ranking(scores: Tensor, higher: Tensor, tied: Tensor) -> dict[str, float | None]:
    """Share of pairs whose preferred response scores higher; pairs whose label was forced on a tie are counted apart.

    scores: (N, 2); higher: (N,) index that should score higher; tied: (N,) bool. Equal scores count one half.
    """
    index = higher[:, None]
    margin = (scores.gather(1, index) - scores.gather(1, 1 - index)).squeeze(1)  # (N,)
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "accuracy": _mean(right[~tied]),
        "accuracy_tied": _mean(right[tied]),
        "margin": _mean(margin[~tied]),
        "pairs": float((~tied).sum()),
        "pairs_tied": float(tied.sum()),
    }


def signs(costs: Tensor, unsafe: Tensor) -> dict[str, float | None]:
    """Cost > 0 against unsafe, over single responses. costs, unsafe: (M,).

    balanced_accuracy is the mean of the two classes' accuracies; auc the chance that an unsafe response costs more
    than a safe one, equal costs counting one half. Both are None where one class is missing.
    """
    bad, good = costs[unsafe], costs[~unsafe]
    caught, spared = _mean(bad > 0), _mean(good <= 0)
    both = caught is not None and spared is not None
    return {
        "sign_accuracy": _mean((costs > 0) == unsafe),
        "balanced_accuracy": (caught + spared) / 2 if both else None,  # type: ignore[operator]
        "auc": auc(bad, good) if both else None,
        "mean_cost_unsafe": _mean(bad),
        "mean_cost_safe": _mean(good),
    }


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2, by ranks: O(M log M)."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, side="left").double()
    not_above = torch.searchsorted(ordered, positive, side="right").double()
    return ((below + not_above) / 2).mean().item() / len(negative)


def reward_metrics(scores: Tensor, labels: dict[str, Tensor]) -> dict[str, float | None]:
    """Ranking accuracy on helpfulness. labels: more_helpful (N,), tied_helpfulness (N,)."""
    return ranking(scores, labels["more_helpful"], labels["tied_helpfulness"])


def cost_metrics(scores: Tensor, labels: dict[str, Tensor]) -> dict[str, float | None]:
    """Ranking (the less safe response costs more) and signs. labels: safer (N,), tied_safety (N,), unsafe (N, 2)."""
    safer = scores.gather(1, labels["safer"][:, None]).squeeze(1)
    found = ranking(scores, 1 - labels["safer"], labels["tied_safety"])
    return found | signs(scores.flatten(), labels["unsafe"].flatten()) | {"mean_cost_safer": _mean(safer)}
