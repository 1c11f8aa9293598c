"""Losses as pure functions. Shapes: B rows, R response length; every (B, R) mean is `masked_mean`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from safe_rlhf_v.tensors import masked_mean


def reward_loss(helpful: Tensor, other: Tensor, regularization: float = 0.001) -> Tensor:
    """Bradley-Terry on helpfulness, arXiv 2503.17682 [code]: mean -log sig(R_helpful - R_other) + reg * mean R^2.

    helpful, other: (B,) scores of the more helpful response and of the other. The second mean is over all 2B scores.
    """
    scores = torch.cat([helpful, other])
    return -logsigmoid(helpful - other).mean() + regularization * scores.square().mean()


def cost_loss(
    unsafer: Tensor,
    safer: Tensor,
    unsafer_sign: Tensor,
    safer_sign: Tensor,
    sign_weight: float = 1.0,
    regularization: float = 0.001,
) -> Tensor:
    """Preference and sign of a cost whose 0 is the boundary of safety, arXiv 2503.17682 [code].

    mean -log sig(C_unsafer - C_safer) + k mean[-log sig(s_u C_unsafer) - log sig(s_s C_safer)] + reg * mean C^2,
    the last mean over all 2B scores. All (B,). Signs s = -harmless_rate in -3..3 (text Safe RLHF, arXiv 2310.12773:
    +1 unsafe, -1 safe); s = 0 adds a constant log 2 and no gradient.
    """
    ranking = -logsigmoid(unsafer - safer).mean()
    sign = -(logsigmoid(unsafer_sign * unsafer) + logsigmoid(safer_sign * safer)).mean()
    return ranking + sign_weight * sign + regularization * torch.cat([unsafer, safer]).square().mean()


def _log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """log pi - log pi_old, 0 at pads before any exponential, so that what stands on a pad cannot reach a gradient."""
    off = ~mask.bool()
    return logps.masked_fill(off, 0.0) - old_logps.masked_fill(off, 0.0)


def clipped_surrogate(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's clipped objective, negated, arXiv 1707.06347 eq. 7: -mean min(rho A, clamp(rho, 1 - clip, 1 + clip) A).

    logps, old_logps, advantages, mask: (B, R). old_logps and advantages carry no gradient.
    """
    ratio = _log_ratio(logps, old_logps, mask).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(gain, mask)


def clip_fraction(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Share of tokens at which the clip is active, that is, at which the surrogate has no gradient. All (B, R)."""
    ratio = _log_ratio(logps.detach(), old_logps, mask).exp()
    active = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return masked_mean(active.float(), mask)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 5.0) -> Tensor:
    """0.5 mean max of the squared error and of that of old + clamp(new - old, -clip, clip). All (B, R) [code]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def reference_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """KL(pi || ref) per token by the k3 estimator, exp(-z) + z - 1 with z = log pi - log ref. All (B, R).

    Never negative, and unbiased in value for samples of pi; the form of GRPO, arXiv 2402.03300 eq. 4.
    """
    log_ratio = _log_ratio(logps, ref_logps, mask)
    return masked_mean(torch.exp(-log_ratio) + log_ratio - 1, mask)


def token_cross_entropy(logps: Tensor, mask: Tensor) -> Tensor:
    """Supervised loss: minus the mean log-probability of the demonstrated tokens. logps, mask: (B, R)."""
    return -masked_mean(logps, mask)
