"""Masks and tokens. Every mean a loss takes and every log-probability a trainer compares comes from here.

Shapes: B rows, R response length, L sequence length, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of each row's token mean. x: (B, R); mask: (B, R) bool. Returns a scalar.

    Values outside the mask are never read, so they may be NaN or infinite. A row without tokens counts for nothing;
    with no tokens at all the mean is 0 and carries no gradient.
    """
    mask = mask.bool()
    tokens = mask.sum(-1)  # (B,)
    row_means = x.masked_fill(~mask, 0.0).sum(-1) / tokens.clamp(min=1)  # (B,), 0 for a row without tokens
    return row_means.sum() / (tokens > 0).sum().clamp(min=1)


def last_attended(mask: Tensor) -> Tensor:
    """Index of the last True of each row, whichever side the padding is on. mask: (B, L). Returns (B,) long.

    Raises ValueError for a row with nothing attended: it has no last token to be scored on.
    """
    attended = mask.bool()
    empty = (~attended.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} attend to no token; drop empty sequences before the forward pass")
    return attended.shape[-1] - 1 - attended.flip(-1).int().argmax(-1)


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of each row's last attended token: never that of a pad. hidden: (B, L, H); mask: (B, L). (B, H)."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, last_attended(mask).to(hidden.device)]


def place_on_last(scores: Tensor, mask: Tensor) -> Tensor:
    """Each row's score on its last response token, 0 elsewhere. scores: (B,); mask: (B, R) right-padded. (B, R).

    A row without tokens stays 0.
    """
    mask = mask.bool()
    is_last = mask & (mask.long().cumsum(-1) == mask.sum(-1, keepdim=True))
    return torch.where(is_last, scores[:, None], scores.new_zeros(()))


def _chunk_logps(
    hidden: Tensor, head: nn.Module | Tensor, ids: Tensor, suppress: Tensor | None, temperature: float
) -> Tensor:
    """Log-probabilities of one chunk. hidden: (n, H); ids: (n,). Returns (n,) float32."""
    logits = (nn.functional.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)).float()  # (n, V)
    if temperature != 1.0:
        logits = logits / temperature
    if suppress is not None:
        logits = logits.index_fill(-1, suppress, float("-inf"))
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def token_logps(
    hidden: Tensor,
    head: nn.Module | Tensor,
    ids: Tensor,
    chunk_size: int = 1024,
    suppress: tuple[int, ...] | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Log-probability of each token, without ever holding (B, R, V) logits. Returns (B, R) float32.

    hidden: (B, R, H), the states that predict each token; head: the output layer, or its weight (V, H); ids: (B, R).
    chunk_size: tokens whose logits may live at once; each chunk's logits are recomputed in the backward pass.
    suppress: ids removed from the softmax, the very ids generation suppresses (image placeholders); a suppressed
    token's own log-probability is -inf. temperature: the one sampling used. mask: (B, R) bool, the tokens asked for;
    no logits are formed for the others, whose log-probability is 0. None: all.
    Raises ValueError when chunk_size or temperature is not positive, or the shapes disagree.
    """
    if chunk_size < 1 or not temperature > 0:
        raise ValueError(f"chunk_size {chunk_size} and temperature {temperature} must both be above 0")
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and ids {tuple(ids.shape)} disagree: one state per token")
    if mask is not None:
        mask = mask.bool()
        few = token_logps(hidden[mask], head, ids[mask], chunk_size, suppress, temperature)
        return few.new_zeros(ids.shape).masked_scatter(mask, few)
    if ids.numel() == 0:
        return hidden.sum(-1).float()
    hidden_chunks = hidden.reshape(-1, hidden.shape[-1]).split(chunk_size)
    id_chunks = ids.reshape(-1).split(chunk_size)
    removed = torch.tensor(sorted(set(suppress)), device=hidden.device) if suppress else None
    # A single chunk is within the bound by itself; recomputing it would only cost time.
    recompute = torch.is_grad_enabled() and len(id_chunks) > 1
    logps = []
    for states, tokens in zip(hidden_chunks, id_chunks, strict=True):
        args = (states, head, tokens, removed, temperature)
        logps.append(checkpoint(_chunk_logps, *args, use_reentrant=False) if recompute else _chunk_logps(*args))
    return torch.cat(logps).view(ids.shape)
