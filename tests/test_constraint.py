"""The constraint: one fit a rollout, window and delay, the state that a checkpoint holds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from safe_rlhf_v.algorithms.crpo import CRPO
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.cost_measures import CVaR, Fitted, HighConfidence, Mean, Rectified
from safe_rlhf_v.duals import AdditiveDual, PIDDual, fixed

RULE = AdditiveDual(lr=1.0, initial=0.0, maximum=50.0)


def test_by_hand_with_window_and_delay() -> None:
    constraint = Constraint(dual=RULE, threshold=0.5, window=3, delay=1)
    # window: 1, 3 -> mean 2; still delayed. 3, -1, 1 (of 1, 3, -1, 1) -> mean 1; lam 0 + .5. 4 alone enters: -1, 1, 4
    assert constraint.observe(torch.tensor([1.0, 3.0])) == (0.0, 1.5)
    assert constraint.observe(torch.tensor([-1.0, 1.0])) == (0.5, 0.5)
    multiplier, violation = constraint.observe(torch.tensor([4.0]))
    assert violation == pytest.approx(4 / 3 - 0.5) and multiplier == pytest.approx(0.5 + violation)


def test_a_window_shorter_than_a_rollout_counts_as_the_rollout() -> None:
    assert Constraint(dual=RULE, window=1).observe(torch.tensor([1.0, 3.0]))[1] == 2.0


def test_a_rollout_is_measured_by_one_fit_to_the_window() -> None:
    class Counted(CVaR):
        def fit(self, known: Tensor) -> Fitted:
            fits.append(known.tolist())
            return CVaR.fit(self, known)

    fits: list[list[float]] = []
    constraint = Constraint(dual=RULE, measure=Counted(0.5), window=4)
    constraint.observe(torch.tensor([3.0, 0.0]))
    _, violation = constraint.observe(torch.tensor([2.0, 1.0]))
    assert violation == 2.5  # the worst half of 0, 1, 2, 3
    # eta 1, of the window: a rank that holds 2 and 0 alone has 1 + 1 / .5 and 1
    assert constraint.measured(torch.tensor([2.0, 0.0])).tolist() == [3.0, 1.0]
    assert fits == [[3.0, 0.0], [3.0, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize("measure", [Mean(), HighConfidence(0.5), CVaR(0.8), Rectified(margin=0.3)])
@pytest.mark.parametrize("dual", [RULE, PIDDual()])
def test_a_constraint_in_two_parts_equals_the_constraint_in_one(measure: object, dual: object) -> None:
    costs = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, second = (Constraint(dual=dual, measure=measure, window=10, delay=2) for _ in range(2))  # type: ignore[arg-type]
    for x in costs[:3]:
        whole.observe(x)
    second.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [whole.observe(x) for x in costs[3:]] == [second.observe(x) for x in costs[3:]]
    assert torch.equal(whole.measured(costs[5].flatten()), second.measured(costs[5].flatten()))
    assert whole.state_dict() == second.state_dict() and whole.observations == 6


def test_the_statistic_of_other_costs_changes_nothing() -> None:
    constraint = Constraint(dual=RULE, measure=CVaR(0.5), window=4)
    constraint.observe(torch.tensor([3.0, 0.0]))
    before = constraint.state_dict()
    assert constraint.statistic(torch.tensor([[10.0, 20.0]])) == 20.0
    assert constraint.state_dict() == before and constraint.measured(torch.tensor([3.0])).tolist() == [6.0]


def test_repo_bounds_what_it_rectifies_by_its_slack() -> None:
    algorithm = RePO(margin=0.5, slack=0.25, window=7, delay=3)
    constraint = algorithm.constraint(RULE)
    assert constraint.measure == Rectified(margin=0.5)
    assert (constraint.threshold, constraint.window, constraint.delay) == (0.25, 7, 3)
    with pytest.raises(ValueError, match=r"takes no CVaR\(alpha=0.9\)"):
        algorithm.constraint(RULE, CVaR())


def test_defaults_are_the_papers() -> None:
    published = PPOLag().constraint(RULE)
    assert (published.threshold, published.window, published.delay) == (-0.5, 128, 1)
    assert CRPO(threshold=1.0, window=5).constraint(fixed(0.0)).window == 5


def test_errors_say_what_to_do() -> None:
    constraint = Constraint(dual=RULE, measure=Rectified(form="per_prompt"))
    with pytest.raises(RuntimeError, match="observe the costs"):
        constraint.measured(torch.ones(2))
    with pytest.raises(ValueError, match="num_generations to at least 2, not 1"):
        constraint.observe(torch.ones(2))
    with pytest.raises(ValueError, match="patience 0"):
        Constraint(dual=RULE, patience=0)


def test_a_prompt_that_the_window_cuts_is_left_out() -> None:
    constraint = Constraint(dual=RULE, measure=Rectified(form="per_prompt"), window=3)
    constraint.observe(torch.tensor([[1.0, 2.0]]))
    assert constraint.observe(torch.tensor([[-1.0, 4.0]]))[1] == 1.5  # known: 2, -1, 4; the mean of (-1, 4)
