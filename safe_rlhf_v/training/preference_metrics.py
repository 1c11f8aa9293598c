"""What a trainer logs of how a reward or cost model orders held-out pairs and, for costs, tells safe from unsafe.

N pairs. A share of nothing is None, not 0. The maths are those of the report (`safe_rlhf_v.statistics`).
"""

from __future__ import annotations

from torch import Tensor

from safe_rlhf_v.statistics import auc, balanced_accuracy, mean_or_none, ranked, sign_accuracy

Figures = dict[str, float | None]


def ranking(scores: Tensor, higher: Tensor, tied: Tensor) -> Figures:
    """Share of pairs whose preferred response scores higher; pairs whose label was forced on a tie are counted apart.

    scores: (N, 2); higher: (N,) index that should score higher; tied: (N,) bool. Equal scores count one half.
    """
    found = ranked(scores, higher, tied)
    return {
        "accuracy": found.accuracy,
        "accuracy_tied": found.accuracy_tied,
        "margin": mean_or_none(found.margin[found.told]),
        "pairs": float(found.pairs),
        "pairs_tied": float(found.pairs_tied),
    }


def reward_metrics(scores: Tensor, labels: dict[str, Tensor]) -> Figures:
    """Ranking accuracy on helpfulness. labels: more_helpful (N,), tied_helpfulness (N,)."""
    return ranking(scores, labels["more_helpful"], labels["tied_helpfulness"])


def cost_metrics(scores: Tensor, labels: dict[str, Tensor]) -> Figures:
    """Ranking (the less safe response costs more) and signs. labels: safer (N,), tied_safety (N,), unsafe (N, 2)."""
    costs, unsafe = scores.flatten(), labels["unsafe"].flatten()
    return ranking(scores, 1 - labels["safer"], labels["tied_safety"]) | {
        "sign_accuracy": sign_accuracy(costs, unsafe),
        "balanced_accuracy": balanced_accuracy(costs > 0, unsafe),
        "auc": auc(costs, unsafe),
        "mean_cost_unsafe": mean_or_none(costs[unsafe]),
        "mean_cost_safe": mean_or_none(costs[~unsafe]),
        "mean_cost_safer": mean_or_none(scores.gather(1, labels["safer"][:, None])),
    }
