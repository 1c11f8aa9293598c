"""A judge at chance carries no verdict, and neither does a multiplier at its maximum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_rlhf_v.evaluation import judge_quality, verdict
from safe_rlhf_v.evaluation.cautions import cautions
from safe_rlhf_v.evaluation.judges import ModelJudge
from safe_rlhf_v.evaluation.preference import cost_metrics, read_preference, reward_metrics
from safe_rlhf_v.evaluation.report import JUDGED, render, table
from safe_rlhf_v.evaluation.report_data import PreferenceMetrics, ReportData
from safe_rlhf_v.evaluation.safety_test import safety_test
from safe_rlhf_v.statistics import Resampling, auc_interval, balanced_accuracy_interval
from tests.evaluation.synthetic import scorer


def cost_model(shift: float, pairs: int = 60, seed: int = 0, draws: int = 4000) -> PreferenceMetrics:
    """Costs of unsafe responses lie `shift` standard deviations above those of safe ones, 0 half way between."""
    rng = np.random.default_rng(seed)
    unsafe = rng.random((pairs, 2)) < 0.5
    scores = rng.standard_normal((pairs, 2)) + shift * (unsafe - 0.5)
    return cost_metrics(scores, scores.argmin(1), unsafe, resampling=Resampling(draws=draws))


AT_CHANCE, WEAK, SOUND = cost_model(0.1), cost_model(0.8, 400), cost_model(3.0)


def judged_by_models(full: ReportData, model: PreferenceMetrics | None, **more: Any) -> ReportData:
    judge = full.judge.model_copy(update={"kind": "model", "name": ModelJudge(scorer).name})
    return full.model_copy(update={"judge": judge, "cost_model": model} | more)


def test_intervals_hold_what_many_samples_give() -> None:
    """Of 120 samples of 80 prompts, 95 % intervals of AUC and balanced accuracy hold the true value in 90 % or more.

    Two normals one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602, balanced accuracy = Phi(1 / 2) = 0.6915.
    """
    held = {"auc": 0, "balanced": 0}
    for seed in range(120):
        found = cost_model(1.0, 80, seed, draws=400)
        for name, interval, truth in (
            ("auc", found.auc_interval, 0.7602), ("balanced", found.balanced_accuracy_interval, 0.6915)
        ):  # fmt: skip
            assert interval is not None and interval.low is not None and interval.high is not None
            held[name] += interval.low <= truth <= interval.high
    assert min(held.values()) >= 0.90 * 120


def test_responses_of_one_prompt_are_one_piece_of_evidence() -> None:
    """Every response ten times over tells nothing new: the same value, and as wide an interval as once."""
    rng = np.random.default_rng(0)
    unsafe = rng.random(100) < 0.4
    scores = rng.standard_normal(100) + unsafe
    for once, often in (
        (auc_interval(scores, unsafe), auc_interval(np.tile(scores, 10), np.tile(unsafe, 10), [*range(100)] * 10)),
        (
            balanced_accuracy_interval(scores > 0, unsafe),
            balanced_accuracy_interval(np.tile(scores > 0, 10), np.tile(unsafe, 10), [*range(100)] * 10),
        ),
    ):
        assert once is not None and often is not None
        assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))


def test_a_perfect_judge_has_an_interval_and_one_class_has_none() -> None:
    unsafe = np.array([True, False] * 20)
    perfect = auc_interval(unsafe * 2.0 - 1, unsafe)
    assert perfect is not None and perfect.value == 1 and 0.8 < (perfect.low or 0) < 1
    assert auc_interval(np.ones(4), np.ones(4)) is None and balanced_accuracy_interval(np.ones(4), np.ones(4)) is None


@pytest.mark.parametrize(
    ("model", "state"), [(AT_CHANCE, "chance"), (WEAK, "weak"), (SOUND, "sound"), (None, "unknown")]
)
def test_quality(model: PreferenceMetrics | None, state: str) -> None:
    assert judge_quality.quality(model) == state
    assert (judge_quality.warning("cost", model, "runs/cost") == "") is (state in ("sound", "unknown"))


def test_a_cost_model_whose_sign_says_nothing_is_at_chance() -> None:
    """It ranks perfectly, but calls nothing unsafe, and the sign is what judges."""
    unsafe = np.tile([True, False], (40, 1))
    assert judge_quality.quality(cost_metrics(unsafe - 5.0, np.ones(40, int), unsafe)) == "chance"


def test_a_reward_model_at_chance_is_warned_of() -> None:
    scores = np.random.default_rng(0).standard_normal((60, 2))
    model = reward_metrics(scores, np.arange(60) % 2)
    assert "reward model runs/reward is at chance" in judge_quality.warning("reward", model, "runs/reward")


def test_a_judge_at_chance_vetoes_the_headline(full: ReportData) -> None:
    tested = full.constraint.model_copy(update={"safety_test": safety_test([-1.0, -1.1, -0.9], -0.5)})
    data = judged_by_models(full, AT_CHANCE, constraint=tested)
    assert verdict.headline(data) == "Nothing can be said of safety: the cost model that judges it is at chance."
    assert "nobody can say" in verdict.constraint(data) and "kept on" not in verdict.constraint(data)
    assert "passed" not in " ".join(verdict.sentences(data))
    (note,) = [n for n in cautions(data) if n.startswith("The cost model tells")]
    interval = AT_CHANCE.auc_interval
    assert interval is not None
    assert f"AUC {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})" in note and "at chance" in note
    assert "train it again" in verdict.next_steps(data)[0]
    page = render(data)
    assert "Safer" not in page.split("</h1>")[0] and "What to do next" in page
    unsafe = next(row for row in table(data, JUDGED) if "Unsafe answers" in row["label"])
    assert unsafe["reading"] == "nobody can say" and "own opinion, which is no better than chance" in page


def test_a_weak_judge_is_said_and_a_sound_one_vetoes_nothing(full: ReportData) -> None:
    plain = verdict.headline(judged_by_models(full, SOUND))
    assert plain.startswith("Safer")
    assert verdict.headline(judged_by_models(full, WEAK)) == f"{plain} By a weak judge."
    assert verdict.headline(judged_by_models(full, None)) == f"{plain} By a judge of unknown quality."
    assert verdict.headline(full.model_copy(update={"cost_model": None})) == verdict.headline(full)  # by the truth
    assert any("is not known" in n for n in cautions(judged_by_models(full, None)))


def test_the_truth_is_not_vetoed_by_the_cost_model_but_the_constraint_is(full: ReportData) -> None:
    data = full.model_copy(update={"cost_model": AT_CHANCE})
    assert verdict.headline(data).startswith("Safer") and "nobody can say" in verdict.constraint(data)


@pytest.mark.parametrize(
    ("multiplier", "violation", "stood"), [(5.0, 0.3, True), (5.0, -0.3, False), (4.9, 0.3, False)]
)
def test_a_multiplier_that_stood_at_its_maximum_vetoes_the_headline(
    full: ReportData, multiplier: float, violation: float, stood: bool
) -> None:
    rows = [{"step": float(k), "multiplier": 1.0 if k < 80 else multiplier, "violation": violation} for k in range(100)]
    bound = full.constraint.model_copy(update={"final_multiplier": multiplier, "maximum_multiplier": 5.0})
    data = full.model_copy(update={"constraint": bound, "trajectory": rows})
    assert verdict.headline(data).startswith("No solution found") is stood
    assert any("ended at its maximum, 5.00" in note for note in cautions(data)) is stood
    assert verdict.next_steps(data)[0].startswith("Keep the start model") is stood
    without = data.model_copy(update={"constraint": bound.model_copy(update={"maximum_multiplier": None})})
    assert not verdict.multiplier_stood(without)  # a fixed multiplier


def test_a_test_that_is_not_passed_is_said_in_plain_words(full: ReportData) -> None:
    tested = full.constraint.model_copy(update={"safety_test": safety_test([0.5, 1.1, 0.9], -0.5)})
    data = full.model_copy(update={"constraint": tested})
    assert "No solution was found: this training gave no policy" in verdict.constraint(data)
    assert verdict.next_steps(data)[0].startswith("Keep the start model, or train the policy anew")


def test_the_page_says_which_model_was_judged(full: ReportData) -> None:
    models = {"base": "runs/mine/sft", "aligned": "runs/mine/direct"}
    assert verdict.judged(full) == "" and "Judged here" not in render(full)
    named = full.model_copy(update={"models": models})
    said = verdict.judged(named)
    assert said.startswith("Judged here: runs/mine/direct") and said.endswith("against runs/mine/sft.")
    assert said in render(named)


def test_held_out_figures_are_read_from_the_scores_that_training_left(tmp_path: Path) -> None:
    assert read_preference(tmp_path, "cost") is None
    rows = [
        {"prompt_id": str(i), "scores": [1.0, -1.0], "safer": 1, "unsafe": [True, False], "tied_safety": False}
        for i in range(20)
    ]
    (tmp_path / "evaluation_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_preference(tmp_path, "cost")
    assert found is not None and found.auc == found.balanced_accuracy == found.accuracy == 1
