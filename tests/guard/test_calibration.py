"""Temperature scaling recovers known temperatures and never invents certainty."""

from pathlib import Path

import pytest
import torch

from guard import losses
from guard.calibration import Calibration, Labels, fit, fit_temperature, scaled

N, K = 6000, 3
TRUE = {"query": 2.5, "response": 0.5, "severity": 1.7, "category": 3.0}


def made() -> tuple[dict[str, torch.Tensor], Labels]:
    """Labels drawn from the probabilities; the logits then multiplied by the temperature to be found."""
    g = torch.Generator().manual_seed(0)
    unsafe, severity, category = (torch.randn(N, k, generator=g) * 2 for k in (2, 3, K))
    is_response = torch.arange(N) % 2 == 1
    draw = lambda p: (torch.rand(p.shape, generator=g) < p).long()  # noqa: E731
    labels = Labels(
        is_response=is_response,
        unsafe=draw(losses.unsafe_logit(unsafe, is_response).sigmoid()),
        severity=torch.multinomial(losses.severity_probabilities(severity), 1, generator=g)[:, 0],
        categories=draw(category.sigmoid()),
    )
    pair = torch.tensor([TRUE["query"], TRUE["response"]])
    return {
        "unsafe": unsafe * pair,
        "severity": severity * TRUE["severity"],
        "category": category * TRUE["category"],
    }, labels


def test_recovers_known_temperatures() -> None:
    logits, labels = made()
    found = fit(logits, labels, "weights")
    for head, t in TRUE.items():
        assert found.temperatures[head] == pytest.approx(t, rel=0.08), head
        before, after = found.report[head]["before"], found.report[head]["after"]
        assert after["nll"] < before["nll"] and after["brier"] < before["brier"] and after["ece"] < 0.03


def test_fit_temperature_is_the_minimum() -> None:
    # (log T - 1)^2 + (log T)^2 / 2n has its minimum at log T = 1 / (1 + 1/2n); n = 1: 2/3
    import math

    assert math.log(fit_temperature(lambda t: (math.log(t) - 1) ** 2, 1)) == pytest.approx(2 / 3, abs=1e-4)


def test_perfect_ranking_does_not_become_certainty() -> None:
    truth = torch.arange(20) % 2
    logits = {
        "unsafe": (truth * 2.0 - 1)[:, None].repeat(1, 2) * 3,
        "severity": torch.zeros(20, 3),
        "category": torch.zeros(20, K),
    }
    unknown = torch.full((20,), -1)
    labels = Labels(is_response=truth == truth, unsafe=truth, severity=unknown, categories=torch.full((20, K), -1))
    found = fit(logits, labels, "w")
    assert 0.3 < found.temperatures["response"] < 1
    assert found.temperatures["query"] == 1 and found.report["query"] == {"n": 0, "temperature": 1.0}


def test_order_of_severity_survives_scaling() -> None:
    logits, _ = made()
    at_least = losses.severity_at_least(scaled(logits, TRUE)["severity"])
    assert (at_least[:, :-1] >= at_least[:, 1:]).all()


def test_id_changes_with_temperatures_and_weights(tmp_path: Path) -> None:
    one = Calibration(weights="a")
    assert (
        one.id
        != Calibration(weights="b").id
        != Calibration(temperatures={**one.temperatures, "query": 1.1}, weights="b").id
    )
    assert Calibration().id == "none"
    one.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == one
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace('"query": 1.0', '"query": 2.0'))
    with pytest.raises(ValueError, match="field 'id'"):
        Calibration.load(tmp_path / "c.json")
