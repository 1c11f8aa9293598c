"""RePO, rectified policy optimisation (NeurIPS 2025, arXiv 2410.19933): C(x, y) <= 0 for every prompt, not in the mean.

A mean lets very safe replies pay for unsafe ones. max over theta, min over lam >= 0 of E[r - beta KL] - lam E[{c}^+].
The authors' code and listing are not to be had; "rectified penalty {C(x, y)}^+" is the text's [secondary].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from safe_rlhf_v.advantages import leave_one_out
from safe_rlhf_v.algorithms.two_critics import streams
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout

Form = Literal["rectified", "gated", "per_prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RePO:
    """A = (A_r - lam A_c) / (1 + lam), A_c of the terminal cost of a form; m is `margin`.

    rectified: {c + m}^+, penalty lam E{c + m}^+. d/dtheta E{c + m}^+ = E[{c + m}^+ d log pi], and a critic of that
        stream is a baseline that no answer changes: the policy gradient is that of E r - lam E{c + m}^+, over 1 + lam.
    per_prompt: penalty lam E_x {E_y[c | x] + m}^+ over the G >= 2 samples of a prompt [secondary: the paper's first
        version]; answers of one prompt pay for each other, prompts do not. d/dtheta = E_x 1{E_y[c | x] + m > 0} E_y[c d
        log pi], and the terminal cost is (c + m) 1{mean cost of the prompt's OTHER samples + m > 0} [ours]. That gate
        knows nothing of the answer it weighs, so every prompt's gradient has the exact direction, whatever the
        critic; its weight is P(mean of G - 1 costs + m > 0) in place of the indicator, its one bias, and gone as G
        grows. The violation, mean over prompts of {mean of G costs + m}^+, is too large by Jensen, at most by
        half the standard deviation of that mean.
    gated: the cost c, and A_c = 0 where c + m <= 0 [ours]. NOT the gradient of the penalty: V_c is subtracted on unsafe
        answers alone, a baseline that hangs on the answer. With two answers that differ by dr in reward and dc in cost,
        P(unsafe) = p moves by p (1 - p) (dr - lam dc (1 - p)) / (1 + lam): there is a saddle at 1 - dr / (lam dc), and
        a prompt whose P(unsafe) stands above it is driven to 1, to where the rectified form drives none once
        lam dc > dr. Kept for comparison.

    margin m >= 0 asks for c <= -m: at 0 the optimum lies on the cost model's boundary, among its misses. slack: of the
    violation, mean of what is rectified; without it, it is never below 0 and the multiplier never falls: start it low,
    move it by AdditiveDual, lam <- min(maximum, lam + lr mean{c + m}^+), and mind its maximum. LogDual then only
    rises, ever faster.
    """

    form: Form = "rectified"
    margin: float = 0.0
    slack: float = 0.0
    beta: float = 0.02
    clip: float = 0.2
    value_clip: float = 5.0
    gamma: float = 1.0
    lam: float = 0.95  # of GAE
    token_clamp: float = 50.0
    window: int = 0
    delay: int = 0
    has_multiplier: ClassVar[bool] = True
    needs_critics: ClassVar[bool] = True
    threshold: ClassVar[float] = 0.0  # safe or not is the sign of the cost, prompt by prompt

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"RePO: form {self.form!r} is not one of {', '.join(map(repr, get_args(Form)))}")
        if not self.margin >= 0:
            raise ValueError(f"RePO: margin {self.margin} must not be below 0: a cost above 0 is unsafe; see slack")

    def violation(self, costs: Tensor) -> float:
        """costs: (n,), or (N, G) with a row a prompt, which per_prompt needs; see `rectified`."""
        return self.rectified(costs).mean().item() - self.slack

    def rectified(self, costs: Tensor) -> Tensor:
        """What the constraint bounds the mean of, float64: {c + m}^+ of every cost, or of each prompt's mean, (N,).

        Raises ValueError where per_prompt is given no prompts of two samples or more.
        """
        costs = costs.double()
        if self.form == "per_prompt":
            if costs.ndim != 2 or costs.shape[1] < 2:
                raise ValueError(f"{TOO_FEW}; the costs have shape {tuple(costs.shape)}, not (N, G)")
            costs = costs.mean(1)
        return (costs + self.margin).clamp(min=0)

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        """Raises ValueError for form per_prompt and groups of one."""
        both = streams(self, rollout, self._terminal(rollout))
        cost = both.cost
        if self.form == "gated":
            cost = torch.where(rollout.costs[:, None] + self.margin > 0, cost, 0.0)
        policy = (both.reward - multiplier * cost) / (1 + multiplier)
        return Advantages(policy=policy, reward_returns=both.reward_returns, cost_returns=both.cost_returns)

    def _terminal(self, rollout: Rollout) -> Tensor:
        """(B,) the terminal costs."""
        if self.form == "gated":
            return rollout.costs
        above = rollout.costs + self.margin
        if self.form == "rectified":
            return above.clamp(min=0)
        if rollout.group_size < 2:
            raise ValueError(TOO_FEW)
        of_others = above - leave_one_out(above, rollout.group_size)
        return torch.where(of_others > 0, above, 0.0)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        args = (logps, rollout.logps, advantages.policy, rollout.responses.mask, self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}


TOO_FEW = "RePO: form 'per_prompt' is of the mean cost of a prompt's samples: set num_generations to at least 2"
