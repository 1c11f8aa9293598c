"""What the algorithms with two critics share: a stream of rewards and one of costs, each with its own GAE."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from safe_rlhf_v.advantages import gae, token_stream
from safe_rlhf_v.types import Rollout


class StreamSettings(Protocol):
    """beta: KL weight; gamma and lam: GAE's; token_clamp: bound of a token's reward and cost."""

    @property
    def beta(self) -> float: ...

    @property
    def gamma(self) -> float: ...

    @property
    def lam(self) -> float: ...

    @property
    def token_clamp(self) -> float: ...


class Streams(NamedTuple):
    """A_r, A_c and the critics' targets, each (B, R)."""

    reward: Tensor
    cost: Tensor
    reward_returns: Tensor
    cost_returns: Tensor


def streams(settings: StreamSettings, rollout: Rollout, costs: Tensor, kl_in_cost: bool = True) -> Streams:
    """r_t = -beta (log pi - log ref)_t and c_t = +beta (log pi - log ref)_t, the scores on the last token [code].

    costs: (B,) terminal costs. kl_in_cost=False leaves the KL out of the costs.
    """
    mask = rollout.responses.mask
    penalty = settings.beta * (rollout.logps - rollout.ref_logps)  # (B, R)
    rewards = token_stream(rollout.rewards, -penalty, mask, settings.token_clamp)
    stream = token_stream(costs, penalty if kl_in_cost else penalty.new_zeros(mask.shape), mask, settings.token_clamp)
    reward_values, cost_values = rollout.values_of_both_critics()
    reward, reward_returns = gae(rewards, reward_values, mask, settings.gamma, settings.lam)
    cost, cost_returns = gae(stream, cost_values, mask, settings.gamma, settings.lam)
    return Streams(reward, cost, reward_returns, cost_returns)
