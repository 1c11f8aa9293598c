"""Data order, random states, records."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from safe_rlhf_v.constraint import BoundWatch
from safe_rlhf_v.online.guidance import describe, summary, threshold_guidance
from safe_rlhf_v.random_state import load_rng_state, rng_state
from safe_rlhf_v.training.runtime import (
    Averages,
    MetricsLog,
    ShuffledIndices,
    fingerprint,
    read_metrics,
)


def test_every_epoch_holds_every_index_once_in_another_order() -> None:
    indices = ShuffledIndices(5, seed=0)
    epochs = [tuple(indices.take(5)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_batches_run_over_the_end_of_an_epoch() -> None:
    indices = ShuffledIndices(3, seed=0)
    assert Counter(indices.take(7) + indices.take(2)) == Counter({0: 3, 1: 3, 2: 3})


@pytest.mark.parametrize("before", [0, 2, 3, 4, 11])
def test_mistake_6_the_place_in_the_data_is_restored(before: int) -> None:
    indices = ShuffledIndices(3, seed=1)
    indices.take(before)
    other = ShuffledIndices(3, seed=1)
    other.load_state_dict(json.loads(json.dumps(indices.state_dict())))
    assert other.take(10) == indices.take(10)


def test_no_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        ShuffledIndices(0, seed=0)


def test_mistake_6_every_generator_is_restored(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), random.random(), float(np.random.randn()), torch.randn(()).item()

    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = [draw() for _ in range(3)]
    load_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == first


def test_metrics_are_cut_back_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path, 0)
    for step in (1, 2, 3, 4):
        metrics.write({"step": step, "reward": step / 10})
    with path.open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    MetricsLog(path, 3).write({"step": 4, "reward": 9.0})
    assert [(row["step"], row["reward"]) for row in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_metrics_refuse_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        MetricsLog(tmp_path / "metrics.jsonl", 0).write({"step": 1, "reward": float("nan")})


def test_averages_weigh() -> None:
    averages = Averages()
    averages.add({"a": 1.0, "b": 4.0}, 0.25)
    averages.add({"a": 3.0}, 0.75)
    assert averages.means() == {"a": 2.5, "b": 4.0}


def test_fingerprint_sees_order_and_borders() -> None:
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
    assert len({fingerprint(x) for x in (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"])}) == 4


def test_guidance_by_hand() -> None:
    guidance = threshold_guidance(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), -0.5)
    assert guidance["mean"] == 0.0 and guidance["quantile_0.25"] == -1.0 and guidance["quantile_0.5"] == 0.0
    assert guidance["share_above_threshold"] == 0.6 and guidance["share_unsafe"] == 0.4
    text = describe(guidance)
    assert "25% -1.00" in text and "d = -0.50: 60% lie above it; the mean must fall by 0.50" in text
    assert "meets it already" in describe(threshold_guidance(torch.tensor([-1.0]), 0.0))


def test_a_multiplier_that_sticks_to_its_maximum_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    watch = BoundWatch(maximum=5.0, patience=3)
    for step, (multiplier, violation) in enumerate([(5.0, 1.0), (5.0, 1.0), (4.9, 1.0), (5.0, 1.0), (5.0, 1.0)]):
        watch.see(multiplier, violation, step)
    assert not caplog.records
    watch.see(5.0, 0.25, 6)
    assert "may be infeasible" in caplog.text and "for 3 steps" in caplog.text and "0.25" in caplog.text


def test_a_multiplier_at_its_maximum_is_fine_while_the_constraint_holds(caplog: pytest.LogCaptureFixture) -> None:
    watch = BoundWatch(maximum=5.0, patience=1)
    watch.see(5.0, -0.1, 1)
    assert not caplog.records


def test_summary_compares_both_ends() -> None:
    rows = [{"reward": i, "cost": 0, "unsafe_share": 0, "multiplier": 1, "kl": 0} for i in range(20)]
    assert "0.500" in summary(rows) and "18.500" in summary(rows)
