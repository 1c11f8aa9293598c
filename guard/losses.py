"""The guard's losses: pure functions of logits and labels. B rows, K categories; a label of -1 is unknown.

Severity is a continuation-ratio model, the CORN loss of Shi, Cao & Raschka (arXiv 2111.08851, eqs. 3 and 6): logit k is
for P(severity >= k+1 | severity >= k), so the cumulative probabilities are products and cannot cross. Chosen over
CORAL (arXiv 1901.07884), whose levels share one direction and differ by a bias only, because what parts harmless from
harmful text is not what parts moderate from severe harm; and because a row that is known to be unsafe but not how
much (ungraded data) has an exact likelihood here: the first factor alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 4
UNKNOWN = -1


def severity_log_at_least(logits: Tensor) -> Tensor:
    """log P(severity >= minor, moderate, severe), (B, 3), falling along the row for any `logits` (B, 3)."""
    return F.logsigmoid(logits).cumsum(-1)


def severity_at_least(logits: Tensor) -> Tensor:
    """P(severity >= minor, moderate, severe), (B, 3)."""
    return severity_log_at_least(logits).exp()


def severity_probabilities(logits: Tensor) -> Tensor:
    """P(none, minor, moderate, severe), (B, 4); rows sum to 1."""
    # P(k) = P(>= k) * P(not >= k+1 | >= k): no difference of near-equal numbers
    reached = F.pad(severity_log_at_least(logits), (1, 0))
    stop = F.pad(F.logsigmoid(-logits), (0, 1))
    return (reached + stop).exp()


def severity_nll(logits: Tensor, severity: Tensor, unsafe: Tensor) -> Tensor:
    """-log likelihood per row, (B,).

    logits: (B, 3). severity: (B,) long, 0..3 or -1. unsafe: (B,) long, 1, 0 or -1.
    Severity known: -log P(severity). Unknown but unsafe: -log P(severity >= minor). Neither known: 0.
    """
    levels = torch.arange(1, LEVELS, device=logits.device)  # level reached by each factor
    known, censored = severity >= 0, (severity < 0) & (unsafe == 1)
    up = known[:, None] & (severity[:, None] >= levels)
    down = known[:, None] & (severity[:, None] == levels - 1)
    up = up | (censored[:, None] & (levels == 1))
    per_factor = torch.where(up, -F.logsigmoid(logits), torch.where(down, -F.logsigmoid(-logits), 0.0))
    return per_factor.sum(-1)


def severity_loss(logits: Tensor, severity: Tensor, unsafe: Tensor) -> Tensor:
    """Mean of `severity_nll` over the rows that say anything; 0 (with a gradient of 0) when none does."""
    counted = (severity >= 0) | (unsafe == 1)
    return severity_nll(logits, severity, unsafe).sum() / counted.sum().clamp(min=1)


def unsafe_loss(logits: Tensor, unsafe: Tensor, is_response: Tensor) -> Tensor:
    """Binary cross-entropy of the head that belongs to the row: column 0 for queries, 1 for responses.

    logits: (B, 2). unsafe: (B,) long, 1, 0 or -1. is_response: (B,) bool.
    """
    own = unsafe_logit(logits, is_response)
    each = F.binary_cross_entropy_with_logits(own, unsafe.clamp(min=0).to(own.dtype), reduction="none")
    counted = unsafe >= 0
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1)


def unsafe_logit(logits: Tensor, is_response: Tensor) -> Tensor:
    """(B, 2) -> (B,): the query's or the response's logit, row by row."""
    return logits.gather(-1, is_response.long()[:, None])[:, 0]


def category_loss(logits: Tensor, categories: Tensor) -> Tensor:
    """Multi-label binary cross-entropy, summed over categories, mean over rows with any known category.

    logits, categories: (B, K); labels 1, 0 or -1.
    """
    known = categories >= 0
    each = F.binary_cross_entropy_with_logits(logits, categories.clamp(min=0).to(logits.dtype), reduction="none")
    return torch.where(known, each, 0.0).sum() / known.any(-1).sum().clamp(min=1)
