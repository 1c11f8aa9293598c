"""What a threshold means on a cost model's scale."""

import json
from pathlib import Path

import pytest
import torch

from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.constraint import BoundWatch
from safe_rlhf_v.duals import AdditiveDual, LogDual, bound, floor
from safe_rlhf_v.online.guidance import describe_suggestions, suggest_thresholds
from safe_rlhf_v.stages.threshold import show_suggestions, threshold, warn_of_judges


def test_suggestions_by_hand() -> None:
    """Safe costs -6, -4, -2 (mean -4), unsafe 3, 5 (mean 4): 8 apart. d = -2 is a quarter of the way: 25 % unsafe.

    For 10 %: 0.9 * -4 + 0.1 * 4 = -3.2; for 5 %: -3.6; for 1 %: -3.92; for none -4.
    """
    found = suggest_thresholds(torch.tensor([-6.0, -4, -2]), torch.tensor([3.0, 5]), -2.0)
    assert found["allowed_unsafe_share"] == pytest.approx(0.25)
    wanted = {"0.1": -3.2, "0.05": -3.6, "0.01": -3.92, "0": -4.0}
    assert {k: found[f"threshold_for_{k}"] for k in wanted} == pytest.approx(wanted)
    assert found["safe_quantile_0.5"] == pytest.approx(-4)
    assert found["share_of_unsafe_above_0"] == 1
    assert "unsafe in 25% of its answers under d = -2.00" in describe_suggestions(found)


def test_suggestions_above_0_are_marked() -> None:
    """Safe costs have the mean .5: no share of unsafe answers has a bound at which costs still mean safe."""
    told = describe_suggestions(suggest_thresholds(torch.tensor([0.0, 1.0]), torch.tensor([2.0]), 0.0))
    assert "0%: d = +0.50*" in told and "no bound to take; train the cost model again" in told
    assert "*" not in describe_suggestions(suggest_thresholds(torch.tensor([-6.0]), torch.tensor([3.0]), 0.0))


def test_auto_never_takes_a_bound_above_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"scores": [c, 9.0], "unsafe": [0, 1]} for c in (0.5, 1.5)]
    (tmp_path / "train_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {"seconds": 1.0, "measured": {"train_sample": {"mean_cost_safe": 1.0}}}
    (tmp_path / "done.json").write_text(json.dumps(done))
    for section in ({"threshold": "auto"}, {"threshold": "auto", "threshold_quantile": 0.5}):
        assert threshold(Settings.model_validate({"policy": section}).policy, tmp_path) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "+1.000 is above 0, and a cost above 0 is unsafe: the bound is 0 instead" in told
    assert threshold(Settings.model_validate({"policy": {"threshold": 2.0}}).policy, tmp_path) == 2
    assert "policy.threshold is +2" in capsys.readouterr().out


@pytest.mark.parametrize("blind", [True, False])
def test_training_a_policy_warns_of_a_cost_model_at_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], blind: bool
) -> None:
    """It gives both responses of a prompt one cost, whatever their labels; another one is always right."""
    rows = [
        {"prompt_id": str(i), "scores": [(-1.0) ** i] * 2 if blind else [1.0, -1.0], "unsafe": [1, 0], "safer": 1}
        for i in range(40)
    ]
    lines = [json.dumps(row | {"tied_safety": False}) + "\n" for row in rows]
    (tmp_path / "evaluation_scores.jsonl").write_text("".join(lines))
    warn_of_judges(str(tmp_path / "none"), str(tmp_path))
    told = " ".join(capsys.readouterr().out.split())
    assert ("is at chance: it cannot tell unsafe responses from safe ones" in told) is blind
    assert ("AUC 0.500" in told) is blind


def test_thresholds_beyond_the_data_allow_none_or_all() -> None:
    safe, unsafe = torch.tensor([-1.0]), torch.tensor([1.0])
    assert suggest_thresholds(safe, unsafe, -3.0)["allowed_unsafe_share"] == 0
    assert suggest_thresholds(safe, unsafe, 3.0)["allowed_unsafe_share"] == 1


def test_a_cost_model_that_cannot_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="train it again"):
        suggest_thresholds(torch.tensor([1.0]), torch.tensor([0.5]), 0.0)


def test_the_policy_stage_reads_the_cost_models_held_out_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"scores": [-5.0, 3.0], "unsafe": [0, 1]}, {"scores": [-3.0, 5.0], "unsafe": [0, 1]}]
    (tmp_path / "evaluation_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_suggestions(0.0, tmp_path, tmp_path)
    assert "unsafe in 50% of its answers under d = +0.00" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "suggested_thresholds.json").read_text())["mean_cost_unsafe"] == 4
    show_suggestions(0.0, tmp_path / "none", tmp_path)
    assert capsys.readouterr().out == ""


def test_a_threshold_at_a_quantile_of_safe_costs(tmp_path: Path) -> None:
    """Safe costs -5, -4, -3, -2, -1: the quantile at .25 is -4, whatever the unsafe ones are."""
    rows = [{"scores": [-float(c), 9.0], "unsafe": [0, 1]} for c in (5, 1, 3, 2, 4)]
    (tmp_path / "train_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings.model_validate({"policy": {"threshold": "auto", "threshold_quantile": 0.25}})
    assert threshold(settings.policy, tmp_path) == -4
    with pytest.raises(SettingsError, match="costs of safe responses"):
        threshold(settings.policy, tmp_path / "none")
    both = Settings.model_validate({"policy": {"threshold": -1, "threshold_quantile": 0.25}})
    with pytest.raises(SettingsError, match="give one of them"):
        threshold(both.policy, tmp_path)


@pytest.mark.parametrize(("dual", "warnings"), [(LogDual(), 2), (AdditiveDual(), 0)])
def test_a_multiplier_that_fell_too_far_to_come_back_is_reported(
    dual: LogDual | AdditiveDual, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One rollout far below the bound, -8, takes 10 to 10 exp(-8) = .0034; 40 of violation 1 leave it there."""
    state, watch = dual.init(), BoundWatch(bound(dual), 20, floor(dual))
    for step, violation in enumerate([-8.0] + [1.0] * 40):
        state = dual.step(state, violation)
        watch.see(state.value, violation, step)
    assert caplog.text.count("hardly anything holds them back") == warnings
    assert (state.value < 0.01) == (warnings > 0)
    watch.see(state.value, -1.0, 42)
    assert watch.steps == 0
