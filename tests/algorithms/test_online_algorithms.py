"""The online algorithms: values by hand, limits, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rollouts import rollout
from tabular import measured

from safe_rlhf_v.advantages import gae, group_relative, leave_one_out, token_stream
from safe_rlhf_v.algorithms.crpo import CRPO
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.imitation import Imitation
from safe_rlhf_v.algorithms.p3o import P3O
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.algorithms.rloo_lag import RLOOLag
from safe_rlhf_v.cost_measures import CVaR, HighConfidence
from safe_rlhf_v.duals import fixed
from safe_rlhf_v.losses import clipped_surrogate
from safe_rlhf_v.types import Inputs, Responses, Rollout

FORMS: Any = ("rectified", "gated", "per_prompt")
ALL = [PPOLag(), *(RePO(form=form, margin=0.1) for form in FORMS), CRPO(), P3O(), GroupLag(), RLOOLag()]
WITH_CRITICS = ALL[:6]
MISSED = 100.0  # a violation so large that the penalty of P3O is on whatever the rows


def violation(algorithm: Any, costs: torch.Tensor) -> float:
    """Of costs (N, G), or (n,) of one sample a prompt."""
    return algorithm.constraint(fixed(0.0)).observe(costs)[1]  # type: ignore[no-any-return]


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
    assert violation(PPOLag(threshold=-0.5), costs) == 1.5
    assert violation(GroupLag(threshold=2.0), costs) == -1.0
    assert violation(RePO(), costs) == pytest.approx(5 / 3)  # (1 + 0 + 4) / 3: safe replies pay for nothing
    assert violation(RePO(slack=1.0), costs) == pytest.approx(2 / 3)


def test_repo_takes_what_is_above_the_margin() -> None:
    costs = torch.tensor([1.0, -2.0, 4.0, -0.25])
    # {c + .5}+: 1.5, 0, 4.5, .25. Prompts of two: means -.5, 1.875; + .5 and rectified: 0, 2.375
    for form in ("rectified", "gated"):
        assert violation(RePO(margin=0.5, form=form), costs) == 6.25 / 4  # type: ignore[arg-type]
    per_prompt = RePO(margin=0.5, form="per_prompt")
    assert violation(per_prompt, costs.view(2, 2)) == 2.375 / 2
    assert violation(replace(per_prompt, slack=0.25), costs.view(2, 2)) == 2.375 / 2 - 0.25
    for wrong in (costs, costs[:, None]):
        with pytest.raises(ValueError, match="num_generations to at least 2"):
            violation(per_prompt, wrong)


def test_repo_gated_ignores_the_cost_of_safe_responses() -> None:
    data, gated = rollout(costs=[-1.0, 2.0, 0.0, 0.5]), RePO(form="gated")
    got, plain = gated.advantages(data, 3.0).policy, PPOLag().advantages(data, 3.0).policy
    reward_alone = PPOLag().advantages(data, 0.0).policy
    assert torch.equal(got[[0, 2]], reward_alone[[0, 2]] / 4)  # over 1 + lam, as the others
    assert torch.equal(got[[1, 3]], plain[[1, 3]])
    with_margin = RePO(form="gated", margin=0.1).advantages(data, 3.0).policy  # 0 is no longer safe enough
    assert torch.equal(with_margin[0], got[0]) and torch.equal(with_margin[1:], plain[1:])


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_repo_rectified_sees_safe_costs_as_zero(margin: float) -> None:
    data = rollout(costs=[-1.0, 2.0, -3.0, 0.5])
    got = RePO(margin=margin).advantages(measured(RePO(margin=margin), data), 3.0)
    want = PPOLag().advantages(replace(data, costs=(data.costs + margin).clamp(min=0)), 3.0)
    assert torch.equal(got.policy, want.policy) and torch.equal(got.cost_returns, want.cost_returns)


def test_repo_per_prompt_weighs_a_cost_by_the_others_of_its_prompt() -> None:
    # Prompt one: -1 and 2, m = .5. The other of -1 is 2 > -.5, so it counts: -.5; the other of 2 is -1: 0.
    # Prompt two: .1 and -.2: both others are above -.5: .6 and .3.
    data = rollout(costs=[-1.0, 2.0, 0.1, -0.2])
    algorithm = RePO(form="per_prompt", margin=0.5)
    got = algorithm.advantages(measured(algorithm, data), 3.0)
    want = PPOLag().advantages(replace(data, costs=torch.tensor([-0.5, 0.0, 0.6, 0.3])), 3.0)
    torch.testing.assert_close(got.policy, want.policy)
    with pytest.raises(ValueError, match="num_generations to at least 2"):
        measured(RePO(form="per_prompt"), rollout(group_size=1))


def test_repo_by_hand_on_one_token() -> None:
    # as for PPOLag: A_r = 2.74. Gated and safe (c = -1): A_r / 5. Rectified: c+ = 0, A_c = .01 - .75 = -.74,
    # (2.74 + 4 * .74) / 5 = 1.14. With a margin of 1.5: {.5}+, A_c = .51 - .75 = -.24, (2.74 + 4 * .24) / 5 = .74
    data = one_token(3.0, -1.0)
    for algorithm, want in ((RePO(form="gated"), 0.548), (RePO(), 1.14), (RePO(margin=1.5), 0.74)):
        assert algorithm.advantages(measured(algorithm, data), 4.0).policy.item() == pytest.approx(want)


def test_repo_forms_coincide_where_every_response_is_unsafe_or_the_multiplier_is_0() -> None:
    unsafe, mixed = rollout(costs=[0.1, 2.0, 1.0, 0.5]), rollout(costs=[-1.0, 2.0, 0.0, 0.5])
    for data, lam in ((unsafe, 3.0), (mixed, 0.0)):
        for form in FORMS:
            got = RePO(form=form).advantages(measured(RePO(form=form), data), lam).policy
            assert torch.equal(got, PPOLag().advantages(data, lam).policy)


def test_repo_clamps_both_streams_in_every_form() -> None:
    data = rollout(costs=[1e3, 1e3, 1e3, 1e3])
    for form in FORMS:
        got = RePO(form=form).advantages(measured(RePO(form=form), replace(data, rewards=data.rewards + 1e3)), 1.0)
        assert got.reward_returns.abs().max() <= 50.0 + 50.0  # values of other tokens enter, at lambda .95
        last = got.cost_returns.gather(1, data.responses.mask.sum(1, keepdim=True) - 1)
        assert torch.equal(last, torch.full_like(last, 50.0))


@pytest.mark.parametrize("kind", [CRPO, P3O])
def test_the_multiplier_enters_neither_crpo_nor_p3o(kind: Any) -> None:
    assert not kind.has_multiplier and PPOLag.has_multiplier
    first, second = (kind().advantages(rollout(), lam, 0.3).policy for lam in (0.0, 9.0))
    assert torch.equal(first, second)


def test_crpo_raises_reward_within_the_tolerance_and_lowers_cost_above_it() -> None:
    # as for PPOLag: A_r = 2.74, A_c = .26
    algorithm, data = CRPO(tolerance=0.5), one_token(3.0, 1.0)
    assert algorithm.advantages(data, 0.0, 0.5).policy.item() == pytest.approx(2.74)
    assert algorithm.advantages(data, 0.0, 0.51).policy.item() == pytest.approx(-0.26)


def test_crpo_is_ppo_on_the_reward_under_a_huge_threshold_and_on_minus_the_cost_under_a_tiny_one() -> None:
    data = rollout()
    for threshold, lam in ((1e6, 0.0), (-1e6, 1e9)):
        algorithm = CRPO(threshold=threshold)
        got = algorithm.advantages(data, 0.0, violation(algorithm, data.costs)).policy
        torch.testing.assert_close(got, PPOLag().advantages(data, lam).policy, atol=1e-6, rtol=1e-6)


def test_p3o_by_hand_on_one_token() -> None:
    # beta .02, log ratio .5: A_r = 2.99 - .25 = 2.74; no KL in the cost: A_c = 1 - .75 = .25. rho = 1.1.
    # J_c - d = -.1: .275 - .1 = .175 -> -3.014 + 2 * .175 = -2.664. J_c - d = -.3: .275 - .3 < 0 -> no penalty
    data = one_token(3.0, 1.0)
    logps = (data.logps + torch.tensor(1.1).log()).requires_grad_()
    algorithm = P3O(kappa=2.0)
    advantages = algorithm.advantages(data, 0.0, -0.1)
    assert (advantages.policy.item(), advantages.cost.item()) == pytest.approx((2.74, 0.25))
    loss, metrics = algorithm.policy_loss(logps, data, advantages)
    assert loss.item() == pytest.approx(-2.664) and metrics["penalty"] == pytest.approx(0.35)
    loss.backward()
    assert logps.grad.item() == pytest.approx(1.1 * (-2.74 + 2 * 0.25))
    loss, metrics = algorithm.policy_loss(logps, data, algorithm.advantages(data, 0.0, -0.3))
    assert loss.item() == pytest.approx(-3.014) and metrics["penalty"] == 0.0


def test_p3o_clips_the_cost_where_it_has_fallen_enough() -> None:
    # A_c = .25: at rho .5 the cost counts as clip(.5) = .8, at rho 1.5 as it is
    data = one_token(3.0, 1.0)
    algorithm = P3O(kappa=1.0)
    advantages = replace(algorithm.advantages(data, 0.0, 0.0), policy=torch.zeros(1, 1))
    for ratio, excess in ((0.5, 0.8 * 0.25), (1.5, 1.5 * 0.25)):
        logps = data.logps + torch.tensor(ratio).log()
        assert algorithm.policy_loss(logps, data, advantages)[0].item() == pytest.approx(excess)


def test_p3o_with_kappa_0_is_ppo_on_the_reward() -> None:
    data, logps = rollout(), rollout().logps * 0.9
    losses = []
    for algorithm in (P3O(kappa=0.0), PPOLag()):
        losses.append(algorithm.policy_loss(logps, data, algorithm.advantages(data, 0.0, MISSED))[0])  # type: ignore[attr-defined]
    assert torch.equal(losses[0], losses[1])


def test_p3o_refuses_advantages_that_are_not_its_own() -> None:
    data = rollout()
    with pytest.raises(ValueError, match="hold no cost"):
        P3O().policy_loss(data.logps, data, PPOLag().advantages(data, 0.0))


def test_rloo_by_hand() -> None:
    # two samples of 2 and 1 tokens; log ratios .5 + .25 and -1; beta .4: r = 2 - .3 = 1.7 and 1 + .4 = 1.4, so
    # L_r = .3, -.3; c = 3, 1: L_c = 2, -2; lam 3: (.3 - 6) / 4 = -1.425
    data = rollout((2, 1), width=2)
    ratios = torch.tensor([[0.5, 0.25], [-1.0, 77.0]])
    logps = torch.full((2, 2), -1.0)
    data = replace(
        data, logps=logps, ref_logps=logps - ratios, rewards=torch.tensor([2.0, 1.0]), costs=torch.tensor([3.0, 1.0])
    )
    advantages = RLOOLag(beta=0.4).advantages(data, 3.0)
    torch.testing.assert_close(advantages.policy, torch.tensor([[-1.425, -1.425], [1.425, 0.0]]))
    # REINFORCE: the gradient of the mean over rows of A times the response's log-probability
    new = data.logps.clone().requires_grad_()
    RLOOLag(beta=0.4).policy_loss(new, data, advantages)[0].backward()
    torch.testing.assert_close(new.grad, -advantages.policy / 2)
    # one ratio a response: .1 on each of 2 tokens is exp(.2) = 1.2214, above the clip; the loss is -1.2 A where A > 0
    flipped = replace(advantages, policy=-advantages.policy)
    loss, metrics = RLOOLag().policy_loss(data.logps + 0.1, data, flipped)
    assert loss.item() == pytest.approx(-(1.2 * 1.425 - 1.425 * 2.718281828**0.1) / 2, abs=1e-5)
    assert metrics["clip_fraction"] == 0.5


def test_rloo_is_the_centred_group_form_times_g_over_g_minus_1() -> None:
    data = rollout(group_size=4)
    rloo, group = RLOOLag(beta=0.0).advantages(data, 2.0), GroupLag(beta=0.0, scale=False).advantages(data, 2.0)
    torch.testing.assert_close(rloo.policy, group.policy * 4 / 3)


def test_rloo_with_multiplier_0_is_rloo_on_the_reward() -> None:
    data = rollout(group_size=4)
    scores = data.rewards - 0.05 * ((data.logps - data.ref_logps) * data.responses.mask).sum(1)
    got = RLOOLag().advantages(data, 0.0).policy
    torch.testing.assert_close(got, leave_one_out(scores, 4)[:, None] * data.responses.mask)


def test_rloo_refuses_groups_of_one() -> None:
    with pytest.raises(ValueError, match="num_generations"):
        RLOOLag().advantages(rollout(group_size=1), 1.0)


@pytest.mark.parametrize("measure", [HighConfidence(0.0), CVaR(0.0)])
@pytest.mark.parametrize("algorithm", ALL)
def test_measures_at_their_limit_change_no_algorithm(algorithm: Any, measure: Any) -> None:
    data = rollout()
    limit = replace(data, costs=measure.fit(data.costs).measured(data.costs))
    costs = [x.costs.view(-1, data.group_size) for x in (limit, data)]
    assert violation(algorithm, costs[0]) == violation(algorithm, costs[1])
    first, second = (algorithm.advantages(measured(algorithm, x), 2.0, 0.1).policy for x in (data, limit))
    assert torch.equal(first, second)


def test_a_shift_of_the_cost_that_the_critic_knows_changes_no_advantage() -> None:
    """What HighConfidence adds so that its mean is the statistic."""
    data = rollout()
    shifted = replace(data, costs=data.costs + 0.7, cost_values=data.cost_values + 0.7)
    torch.testing.assert_close(PPOLag().advantages(shifted, 2.0).policy, PPOLag().advantages(data, 2.0).policy)


def test_repo_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="'hard' is not"):
        RePO(form="hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margin -1"):
        RePO(margin=-1.0)


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
        advantages = algorithm.advantages(data, 1.5, MISSED)
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
    advantages = algorithm.advantages(data, 1.0, MISSED)
    logps = data.logps.clone().requires_grad_()
    loss, _ = algorithm.policy_loss(logps, data, advantages)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all() and logps.grad.any()


@pytest.mark.parametrize("algorithm", ALL)
def test_rows_may_be_taken_in_any_order(algorithm: Any) -> None:
    data = rollout()
    advantages = algorithm.advantages(data, 1.0, MISSED)
    rows = [2, 0]
    both = algorithm.policy_loss(data.logps[rows] * 0.9, data.select(rows), advantages.select(rows))
    single = [algorithm.policy_loss(data.logps[[i]] * 0.9, data.select([i]), advantages.select([i]))[0] for i in rows]
    torch.testing.assert_close(both[0], sum(single) / 2)


@pytest.mark.parametrize("algorithm", WITH_CRITICS)
def test_critics_are_needed(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="both critics"):
        algorithm.advantages(replace(rollout(), cost_values=None), 1.0, 0.0)


def test_published_defaults() -> None:
    algorithm = PPOLag()
    assert (algorithm.threshold, algorithm.beta, algorithm.window, algorithm.delay) == (-0.5, 0.02, 128, 1)
    assert (algorithm.clip, algorithm.value_clip, algorithm.gamma, algorithm.lam) == (0.2, 5.0, 1.0, 0.95)
    assert algorithm.token_clamp == 50.0


def test_imitation_has_no_policy_gradient() -> None:
    data = rollout(group_size=1)
    advantages = Imitation().advantages(data, 3.0)
    assert not advantages.policy.any() and advantages.reward_returns is None
    logps = data.logps.clone().requires_grad_()
    loss, _ = Imitation().policy_loss(logps, data, advantages)
    loss.backward()
    assert float(loss) == 0 and not logps.grad.any()
