"""What the algorithms with two critics share: a stream of rewards and one of costs, each with its own GAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from torch import Tensor

from safe_rlhf_v.advantages import gae, token_stream
from safe_rlhf_v.algorithms.constrained import CriticSettings
from safe_rlhf_v.fields import NonNegative, Rate, Share
from safe_rlhf_v.losses import clip_fraction, clipped_surrogate
from safe_rlhf_v.types import Advantages, Rollout


class Streams(NamedTuple):
    """A_r, A_c and the critics' targets, each (B, R)."""

    reward: Tensor
    cost: Tensor
    reward_returns: Tensor
    cost_returns: Tensor

    def advantages(self, policy: Tensor) -> Advantages:
        """With what was made of A_r and A_c, (B, R)."""
        return Advantages(policy=policy, reward_returns=self.reward_returns, cost_returns=self.cost_returns)

    def weighed(self, multiplier: float, cost: Tensor | None = None) -> Advantages:
        """(A_r - lam A_c) / (1 + lam). cost: in place of A_c."""
        return self.advantages((self.reward - multiplier * (self.cost if cost is None else cost)) / (1 + multiplier))


@dataclass(frozen=True, kw_only=True)
class TwoCritics:
    """PPO on the policy, and a critic of each stream. Defaults: the released code of arXiv 2503.17682 [code]."""

    beta: Annotated[NonNegative, "Weight of the KL to the reference, in the rewards. [code] 0.02"] = 0.02
    clip: Annotated[Rate, "Clip range of the policy ratio. [code] 0.2"] = 0.2
    value_clip: Annotated[Rate, "Clip range of the value update. [code] 5"] = 5.0
    gamma: Annotated[Share, "Discount. [code] 1"] = 1.0
    lam: Annotated[Share, "GAE lambda. [code] 0.95"] = 0.95
    token_clamp: Annotated[Rate, "Bound of a token's reward and cost. [code] 50"] = 50.0

    @property
    def critics(self) -> CriticSettings:
        return CriticSettings(value_clip=self.value_clip)

    def streams(self, rollout: Rollout, kl_in_cost: bool = True) -> Streams:
        """r_t = -beta (log pi - log ref)_t and c_t = +beta (log pi - log ref)_t, the scores on the last token [code].

        kl_in_cost=False leaves the KL out of the costs.
        """
        mask = rollout.responses.mask
        penalty = self.beta * (rollout.logps - rollout.ref_logps)  # (B, R)
        in_cost = penalty if kl_in_cost else penalty.new_zeros(mask.shape)
        rewards = token_stream(rollout.rewards, -penalty, mask, self.token_clamp)
        costs = token_stream(rollout.costs, in_cost, mask, self.token_clamp)
        reward_values, cost_values = rollout.values_of_both_critics()
        reward, reward_returns = gae(rewards, reward_values, mask, self.gamma, self.lam)
        cost, cost_returns = gae(costs, cost_values, mask, self.gamma, self.lam)
        return Streams(reward, cost, reward_returns, cost_returns)

    def policy_loss(self, logps: Tensor, rollout: Rollout, advantages: Advantages) -> tuple[Tensor, dict[str, float]]:
        args = (logps, rollout.logps, advantages.policy, rollout.responses.mask, self.clip)
        return clipped_surrogate(*args), {"clip_fraction": clip_fraction(*args).item()}
