"""The safety test: by hand, its error rate, its unit of evidence."""

from __future__ import annotations

import numpy as np
import pytest

from safe_rlhf_v.evaluation import safety_test


def test_by_hand() -> None:
    # costs -2, -1, 0: mean -1, std 1, n 3; t_{.95, 2} = 2.91999; bound -1 + 2.91999 / sqrt 3 = .68586
    test = safety_test([-2.0, -1.0, 0.0], 0.5)
    assert (test.mean, test.std, test.n) == (-1.0, 1.0, 3)
    assert test.upper_bound == pytest.approx(0.685859, abs=1e-5) and not test.passed
    assert safety_test([-2.0, -1.0, 0.0], 0.7).passed
    # t_{.5} = 0: at delta .5 the bound is the mean
    assert safety_test([-2.0, -1.0, 0.0], -1.0, delta=0.5).upper_bound == pytest.approx(-1.0)


def test_samples_of_one_prompt_are_one_piece_of_evidence() -> None:
    many = safety_test([-2.0, -2.0, -2.0, -1.0, 0.0, 0.0], 0.5, ["a", "a", "a", "b", "c", "c"])
    assert many == safety_test([-2.0, -1.0, 0.0], 0.5)


def test_a_policy_on_the_bound_passes_with_probability_delta() -> None:
    rng = np.random.default_rng(0)
    passed = [safety_test(rng.normal(0.0, 1.0, 20), 0.0, delta=0.1).passed for _ in range(2000)]
    assert np.mean(passed) == pytest.approx(0.1, abs=0.02)  # 3 standard errors: 0.02


def test_one_prompt_proves_nothing() -> None:
    test = safety_test([-9.0], 0.0)
    assert test.upper_bound is None and not test.passed


def test_delta_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="delta 95"):
        safety_test([0.0, 1.0], 0.0, delta=95)
