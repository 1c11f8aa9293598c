"""Calibration by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from safe_rlhf_v import statistics as s


def test_calibration_by_hand() -> None:
    # bin 0..1/10: predicted .1, seen 1/2; bin 9/10..1: predicted .9, seen 1: ECE = (.4 + .1) / 2
    assert s.expected_calibration_error([0.05, 0.05, 0.95, 0.95], [0, 1, 1, 1]) == pytest.approx((0.45 + 0.05) / 2)
    table = s.calibration_bins([0.0, 1.0, 0.5], [0, 1, 1])
    assert [b.count for b in table] == [1, 1, 1] and table[-1].confidence == 1.0
    with pytest.raises(ValueError, match="outside 0..1"):
        s.calibration_bins([1.2], [1])


def test_calibrated_predictions_have_little_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert s.expected_calibration_error(p, rng.random(20_000) < p) < 0.02
    assert s.expected_calibration_error(p, rng.random(20_000) < p**3) > 0.2


def test_sigmoid_does_not_overflow() -> None:
    assert s.sigmoid([-1000.0, 0.0, 1000.0]).tolist() == [0.0, 0.5, 1.0]
