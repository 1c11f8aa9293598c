"""From scores to advantages. Shapes: B rows, N prompts, G samples a prompt, B = N*G, R response length."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_rlhf_v.tensors import place_on_last


def token_stream(scores: Tensor, per_token: Tensor, mask: Tensor, limit: float = 50.0) -> Tensor:
    """A score on the last response token plus a per-token term, clamped to +-limit, arXiv 2503.17682 [code].

    scores: (B,) rewards or costs; per_token: (B, R), e.g. -beta (log pi - log ref). Returns (B, R), 0 at pads.
    """
    stream = per_token.masked_fill(~mask.bool(), 0.0) + place_on_last(scores, mask)
    return stream.clamp(-limit, limit)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv 1506.02438 eq. 16, on right-padded rows: (advantages, returns).

    rewards, values, mask: (B, R). The episode ends at the last True of the row: nothing is bootstrapped from a pad,
    and pads hold 0 in both results. Neither result carries a gradient.
    Raises ValueError when a row's mask has a token after a pad.
    """
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("mask: a token follows a pad; responses must be right-padded")
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = values.new_zeros(values.shape[0])  # (B,) advantage of the next token
    next_value = torch.zeros_like(following)  # (B,) value of the next token; 0 past the end and at pads, like all else
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean of the OTHER samples of its prompt, arXiv 2402.14740: unbiased at any G.

    It is group_relative(..., scale=False) times G / (G - 1). scores: (B,), rows of one prompt together. Returns (B,).
    Raises ValueError when group_size is below 2 or does not divide B.
    """
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: leave-one-out needs at least 2 samples of a prompt")
    return group_relative(scores, group_size, scale=False) * group_size / (group_size - 1)


def group_relative(scores: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Score minus the mean of its prompt's group, over the group's standard deviation, arXiv 2402.03300 section 4.1.

    scores: (B,), rows of one prompt together. The deviation is that of the population (divide by G), which is defined
    at G = 1. A group with sigma 0 gives 0. scale=False leaves the deviation out (arXiv 2503.20783). Returns (B,).
    Raises ValueError when group_size does not divide B.
    """
    if group_size < 1 or scores.numel() % group_size:
        raise ValueError(f"group_size {group_size} does not divide {scores.numel()} scores")
    groups = scores.view(-1, group_size)  # (N, G)
    centred = groups - groups.mean(-1, keepdim=True)
    sigma = centred.square().mean(-1, keepdim=True).sqrt()
    # Equal scores leave a mean that is off by a rounding error, which a division by sigma would blow up to +-1.
    flat = sigma <= 1e-6 * groups.abs().amax(-1, keepdim=True)
    divisor = torch.where(flat, torch.ones_like(sigma), sigma) if scale else torch.ones_like(sigma)
    return torch.where(flat, torch.zeros_like(centred), centred / divisor).view(-1)
