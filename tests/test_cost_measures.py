"""Cost measures: the statistic by hand and against definitions, the gradient against autograd, the limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v.cost_measures import CostMeasure, CVaR, HighConfidence, Mean

T = torch.tensor


def of_itself(measure: CostMeasure, costs: torch.Tensor) -> torch.Tensor:
    """Costs as they are measured where they are all that is known."""
    return measure.fit(costs).measured(costs)


def test_high_confidence_by_hand() -> None:
    # known (0, 2): mu 1, sigma 1; kappa 2. c = 0: 0 + 2 (1 + 1) / 2 = 2; c = 2: 2 + 2 = 4; c = 3: 3 + (4 + 1) = 8
    got = HighConfidence(2.0).fit(T([0.0, 2.0])).measured(T([0.0, 2.0, 3.0]))
    assert got.tolist() == [2.0, 4.0, 8.0]


def test_high_confidence_is_the_released_form_but_for_a_constant() -> None:
    known = torch.randn(50, dtype=torch.float64)
    mu, sigma, kappa = known.mean(), known.std(correction=0), 0.7
    released = known + kappa * (known**2 - 2 * known * mu) / (2 * sigma)
    shift = of_itself(HighConfidence(kappa), known) - released
    torch.testing.assert_close(shift, (kappa * (mu**2 + sigma**2) / (2 * sigma)).expand(50))


def test_cvar_by_hand() -> None:
    # worst half of (0, 1, 2, 3): mean 2.5. eta = 1, the second smallest: 1 + {c - 1}^+ / .5 = 1, 1, 3, 5
    known = T([3.0, 0.0, 2.0, 1.0])
    assert of_itself(CVaR(0.5), known).tolist() == [5.0, 1.0, 3.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000), st.floats(0, 0.95), st.floats(0, 3))
def test_the_mean_of_the_measured_costs_is_the_statistic(n: int, seed: int, alpha: float, kappa: float) -> None:
    torch.manual_seed(seed)
    costs = torch.randn(n, dtype=torch.float64)
    spread = of_itself(HighConfidence(kappa), costs).mean().item()
    assert spread == pytest.approx((costs.mean() + kappa * costs.std(correction=0)).item())
    # a minimiser over eta is one of the costs
    least = min(eta + (costs - eta).clamp(min=0).mean().item() / (1 - alpha) for eta in costs.tolist())
    assert of_itself(CVaR(alpha), costs).mean().item() == pytest.approx(least)


@pytest.mark.parametrize("measure", [Mean(), HighConfidence(0.8), CVaR(0.55)])
def test_the_policy_gradient_of_the_measured_costs_is_that_of_the_statistic(measure: Any) -> None:
    """A distribution over 5 costs: d statistic / d logits by autograd = sum over c of d pi(c) * measured c."""
    # cumulative .3 .4 .6 .9 1: at level .55 the quantile is .7
    counts, values = T([3, 1, 2, 3, 1]), T([-1.0, 0.5, 0.7, 2.0, 3.0], dtype=torch.float64)
    logits = (counts / 10).double().log().requires_grad_()
    pi = logits.softmax(0)
    mean = (pi * values).sum()
    statistic = {
        "Mean": mean,
        "HighConfidence": mean + 0.8 * ((pi * values**2).sum() - mean**2).sqrt(),
        "CVaR": 0.7 + (pi * (values - 0.7).clamp(min=0)).sum() / 0.45,
    }[type(measure).__name__]
    (want,) = torch.autograd.grad(statistic, logits, retain_graph=True)
    known = values.repeat_interleave(counts)
    (got,) = torch.autograd.grad((pi * measure.fit(known).measured(values)).sum(), logits)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("measure", [Mean(), HighConfidence(0.0), CVaR(0.0)])
def test_limits_are_the_mean_exactly(measure: Any) -> None:
    costs = torch.randn(20)
    assert torch.equal(measure.fit(torch.randn(7)).measured(costs), costs)


@pytest.mark.parametrize("measure", [HighConfidence(3.0), CVaR(0.9)])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_equal_costs_are_their_own_statistic(measure: Any, value: float) -> None:
    costs = torch.full((6,), value)
    assert torch.equal(of_itself(measure, costs), costs)


def test_pessimism_never_lowers_a_violation() -> None:
    costs = torch.randn(30)
    assert of_itself(HighConfidence(1.0), costs).mean() > costs.mean()
    assert of_itself(CVaR(0.9), costs).mean() > costs.mean()


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        CVaR(1.0)
    with pytest.raises(ValueError, match="kappa -1"):
        HighConfidence(-1.0)
