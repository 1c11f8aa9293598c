"""PPO-Lagrangian, RePO and GroupLag: values by hand, limits, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rollouts import rollout

from safe_rlhf_v.advantages import gae, group_relative, token_stream
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.losses import clipped_surrogate
from safe_rlhf_v.types import Inputs, Responses, Rollout

ALL = [PPOLag(), RePO(), RePO(form="rectified"), GroupLag()]
WITH_CRITICS = ALL[:3]


def one_token(
    reward: float, cost: float, log_ratio: float = 0.5, reward_value: float = 0.25, cost_value: float = 0.75
) -> Rollout:
    def cell(x: float) -> torch.Tensor:
        return torch.tensor([[x]])

    return Rollout(
        prompts=Inputs(input_ids=torch.ones(1, 1).long(), attention_mask=torch.ones(1, 1), vision=({},)),
        responses=Responses(ids=torch.ones(1, 1).long(), mask=torch.ones(1, 1).bool()),
        logps=cell(-1.0), ref_logps=cell(-1.0 - log_ratio), rewards=torch.tensor([reward]), costs=torch.tensor([cost]),
        reward_values=cell(reward_value), cost_values=cell(cost_value),
    )  # fmt: skip


def test_ppo_lag_by_hand_on_one_token() -> None:
    # beta .02, log ratio .5: KL term .01. r = 3 - .01, A_r = 2.99 - .25 = 2.74; c = 1 + .01, A_c = 1.01 - .75 = .26
    # lam 4: (2.74 - 4 * .26) / 5 = .34
    advantages = PPOLag().advantages(one_token(3.0, 1.0), 4.0)
    assert advantages.policy.item() == pytest.approx(0.34)
    assert advantages.reward_returns.item() == pytest.approx(2.99)
    assert advantages.cost_returns.item() == pytest.approx(1.01)


def test_ppo_lag_clamps_both_streams() -> None:
    advantages = PPOLag().advantages(one_token(1e3, -1e3), 1.0)
    assert advantages.reward_returns.item() == 50.0 and advantages.cost_returns.item() == -50.0


def test_ppo_lag_with_multiplier_0_is_ppo_on_the_reward_alone() -> None:
    data, algorithm = rollout(), PPOLag(beta=0.1)
    mask = data.responses.mask
    stream = token_stream(data.rewards, -0.1 * (data.logps - data.ref_logps), mask)
    want = gae(stream, data.reward_values, mask, 1.0, 0.95)[0]
    got = algorithm.advantages(data, 0.0)
    assert torch.equal(got.policy, want)
    logps = (data.logps + 0.1 * torch.randn(data.logps.shape)).requires_grad_()
    loss, _ = algorithm.policy_loss(logps, data, got)
    assert loss.item() == clipped_surrogate(logps, data.logps, want, mask).item()


def test_ppo_lag_with_a_huge_multiplier_only_lowers_cost() -> None:
    data, algorithm = rollout(), PPOLag()
    mask = data.responses.mask
    stream = token_stream(data.costs, algorithm.beta * (data.logps - data.ref_logps), mask)
    want = -gae(stream, data.cost_values, mask)[0]
    torch.testing.assert_close(algorithm.advantages(data, 1e7).policy, want, atol=1e-5, rtol=1e-5)


def test_mistake_5_both_critics_enter_the_advantages() -> None:
    data = rollout()
    base = PPOLag().advantages(data, 1.0).policy
    for name in ("reward_values", "cost_values"):
        changed = replace(data, **{name: getattr(data, name) + 1.0})
        assert not torch.allclose(PPOLag().advantages(changed, 1.0).policy, base)


def test_threshold_is_subtracted_and_sign_means_unsafe() -> None:
    costs = torch.tensor([1.0, -2.0, 4.0])  # mean 1
    assert PPOLag(threshold=-0.5).violation(costs) == 1.5
    assert GroupLag(threshold=2.0).violation(costs) == -1.0
    assert RePO().violation(costs) == pytest.approx(5 / 3)  # (1 + 0 + 4) / 3: safe replies pay for nothing
    assert RePO(slack=1.0).violation(costs) == pytest.approx(2 / 3)


def test_repo_gated_ignores_the_cost_of_safe_responses() -> None:
    data = rollout(costs=[-1.0, 2.0, 0.0, 0.5])
    gated, plain = RePO().advantages(data, 3.0).policy, PPOLag().advantages(data, 3.0).policy
    reward_alone = PPOLag().advantages(data, 0.0).policy
    assert torch.equal(gated[[0, 2]], reward_alone[[0, 2]])
    assert torch.equal(gated[[1, 3]], plain[[1, 3]])


def test_repo_rectified_sees_safe_costs_as_zero() -> None:
    data = rollout(costs=[-1.0, 2.0, -3.0, 0.5])
    got = RePO(form="rectified").advantages(data, 3.0)
    want = PPOLag().advantages(replace(data, costs=data.costs.clamp(min=0)), 3.0)
    assert torch.equal(got.policy, want.policy) and torch.equal(got.cost_returns, want.cost_returns)


def test_repo_by_hand_on_one_token() -> None:
    # as for PPOLag: A_r = 2.74. Gated and safe (c = -1): A_r. Rectified: c+ = 0, A_c = .01 - .75 = -.74,
    # (2.74 + 4 * .74) / 5 = 1.14
    assert RePO().advantages(one_token(3.0, -1.0), 4.0).policy.item() == pytest.approx(2.74)
    assert RePO(form="rectified").advantages(one_token(3.0, -1.0), 4.0).policy.item() == pytest.approx(1.14)


def test_repo_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="'hard' is not"):
        RePO(form="hard")  # type: ignore[arg-type]


def test_group_lag_combines_advantages_not_scores() -> None:
    data, lam = rollout(group_size=4), 2.0
    want = (group_relative(data.rewards, 4) - lam * group_relative(data.costs, 4)) / (1 + lam)
    got = GroupLag().advantages(data, lam).policy
    for row, scalar, mask in zip(got, want, data.responses.mask, strict=True):
        assert row[mask].tolist() == [scalar.item()] * int(mask.sum()) and not row[~mask].any()
    # the cost's scale is standardised away before lam weighs it; standardising r - lam c would let it in
    rescaled = GroupLag().advantages(replace(data, costs=100 * data.costs), lam).policy
    torch.testing.assert_close(rescaled, got)


def test_group_lag_by_hand() -> None:
    # one group of two: Z_r = (1, -1), Z_c = (1, -1); lam 3: (1 - 3) / 4 = -.5 and .5
    data = replace(rollout((1, 1), width=1), rewards=torch.tensor([5.0, 1.0]), costs=torch.tensor([2.0, 0.0]))
    assert GroupLag().advantages(data, 3.0).policy.tolist() == [[-0.5], [0.5]]


def test_group_lag_penalises_divergence_from_the_reference() -> None:
    data = rollout((4, 4, 4, 4))
    flat = GroupLag(beta=0.5).advantages(replace(data, rewards=torch.zeros(4), costs=torch.zeros(4)), 1.0)
    logps = data.logps.clone().requires_grad_()
    loss, _ = GroupLag(beta=0.5).policy_loss(logps, data, flat)
    loss.backward()
    # d k3 / d logp = 1 - exp(ref - logp), times beta, over 4 rows and 4 tokens
    torch.testing.assert_close(logps.grad, 0.5 * (1 - (data.ref_logps - data.logps).exp()) / 16)


def test_group_lag_refuses_groups_of_one() -> None:
    with pytest.raises(ValueError, match="num_generations"):
        GroupLag().advantages(rollout(group_size=1), 1.0)


@pytest.mark.parametrize("algorithm", ALL)
def test_mistake_3_padding_changes_nothing(algorithm: Any) -> None:
    """The same rollout in 4 and in 7 columns: equal advantages, losses and gradients; pads hold 0."""
    results = []
    for width in (4, 7):
        data = rollout(width=width)
        advantages = algorithm.advantages(data, 1.5)
        logps = (data.logps * 0.9).detach().requires_grad_()
        loss, metrics = algorithm.policy_loss(logps, data, advantages)
        loss.backward()
        assert not advantages.policy[~data.responses.mask].any() and not logps.grad[~data.responses.mask].any()
        results.append((advantages.policy[:, :4], loss, logps.grad[:, :4], metrics["clip_fraction"]))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide)


@pytest.mark.parametrize("algorithm", ALL)
def test_mistake_4_responses_of_one_token_work(algorithm: Any) -> None:
    data = rollout((1, 1, 1, 1), width=1)
    advantages = algorithm.advantages(data, 1.0)
    logps = data.logps.clone().requires_grad_()
    loss, _ = algorithm.policy_loss(logps, data, advantages)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all() and logps.grad.any()


@pytest.mark.parametrize("algorithm", ALL)
def test_rows_may_be_taken_in_any_order(algorithm: Any) -> None:
    data = rollout()
    advantages = algorithm.advantages(data, 1.0)
    rows = [2, 0]
    both = algorithm.policy_loss(data.logps[rows] * 0.9, data.select(rows), advantages.select(rows))
    single = [algorithm.policy_loss(data.logps[[i]] * 0.9, data.select([i]), advantages.select([i]))[0] for i in rows]
    torch.testing.assert_close(both[0], sum(single) / 2)


@pytest.mark.parametrize("algorithm", WITH_CRITICS)
def test_critics_are_needed(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="both critics"):
        algorithm.advantages(replace(rollout(), cost_values=None), 1.0)


def test_published_defaults() -> None:
    algorithm = PPOLag()
    assert (algorithm.threshold, algorithm.beta, algorithm.window, algorithm.delay) == (-0.5, 0.02, 128, 1)
    assert (algorithm.clip, algorithm.value_clip, algorithm.gamma, algorithm.lam) == (0.2, 5.0, 1.0, 0.95)
    assert algorithm.token_clamp == 50.0
