"""The iterative loop on a tiny vision-language model: what is sampled, relabelled, trained, kept and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import comparisons
from safetensors.torch import load_file
from sections import of

from beavertails_v.schema import Prompt
from beavertails_v.taxonomy import Taxonomy
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.direct.trainer import DirectTrainer
from safe_rlhf_v.iterative.loop import IterativeArguments, IterativeResult, iterate
from safe_rlhf_v.iterative.problem import Constraints, ModelProblem
from safe_rlhf_v.iterative.samples import PreferenceScorer, Sampled, draw
from safe_rlhf_v.roles.separate import SeparateRoles
from safe_rlhf_v.stages import data
from safe_rlhf_v.stages.report_constraint import constraint_of
from safe_rlhf_v.stages.stages import STAGES
from safe_rlhf_v.training.supervised import train_preference_model, train_sft
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.processing import Encoder, load_processor

PROMPTS = [row.prompt for row in comparisons(12)]
VIOLENCE, PRIVACY = "violence_and_physical_harm", "privacy_invasion_and_surveillance"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A start model that refuses or answers, and a reward and a cost model that tell the two apart."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_models.save("llava", folder / "llava")
    quick = ["learning_rate=1e-2", "per_device_train_batch_size=4", "save_steps=1000"]
    chosen = [f"{stage}.{x}" for stage in ("sft", "reward", "cost") for x in quick]
    chosen += ["sft.max_steps=60", "sft.responses=all", "reward.max_steps=12", "cost.max_steps=12"]
    rows = (comparisons(24), comparisons(4))
    train_sft(*rows, base, folder / "start", *of(load_settings(None, chosen), "sft"))
    for kind in ("reward", "cost"):
        train_preference_model(kind, *rows, folder / "start", folder / kind, *of(load_settings(None, chosen), kind))  # type: ignore[arg-type]
    return {name: folder / name for name in ("start", "reward", "cost")}


def settings(*more: str) -> Settings:
    quick = [
        "bounds=0.2", "iterations=2", "prompts=6", "samples=8", "pair_samples=4", "max_new_tokens=40",
        "rows_at_once=24", "learning_rate=5e-3", "num_train_epochs=2", "per_device_train_batch_size=4",
        "save_steps=1", "bootstrap=100",
    ]  # fmt: skip
    return load_settings(None, [f"iterative.{x}" for x in quick] + list(more))


def problem(models: dict[str, Path], folder: Path, *more: str) -> ModelProblem:
    return ModelProblem(
        *of(settings(*more), "iterative"), folder, models["start"], (models["reward"], models["cost"]), PROMPTS
    )


def run(models: dict[str, Path], folder: Path, *more: str) -> IterativeResult:
    one = problem(models, folder, *more)
    return iterate(one, IterativeArguments(output_dir=folder, iterations=one.section.iterations, bootstrap=100))


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IterativeResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(models, folder)


def test_each_iteration_is_trained_measured_and_logged(whole: tuple[Path, IterativeResult]) -> None:
    folder, result = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["multiplier"] == {"all": result.one_shot.multipliers[0]}  # the warm start
    for row, one in zip(rows, result.iterates, strict=True):
        assert row["improvement"]["all"]["value"] == pytest.approx(0.2 + row["slack"]["all"])
        assert row["gap"]["value"] == pytest.approx(row["dual"]["value"] - row["primal"]["value"])
        assert row["gap"]["low"] <= row["gap"]["value"] <= row["gap"]["high"]
        assert one.suboptimality.value >= 0
        assert row["kl"] > 0  # it has moved from the start model
    # Where the first iteration fell short (or not) the multiplier rose (or fell).
    first, second = (x.multipliers[0] for x in result.iterates)
    assert (second - first) * result.iterates[0].slack[0] < 0 or second == first == 0
    assert not list(folder.rglob("checkpoint-*"))


def test_improvement_is_that_of_the_samples(models: dict[str, Path], whole: tuple[Path, IterativeResult]) -> None:
    folder, result = whole
    reference, sampled = (torch.load(folder / name) for name in ("reference.pt", "iteration-2/samples.pt"))
    assert sampled["costs"].shape == (6, 8)
    by_hand = (reference["costs"].double().mean() - sampled["costs"].double().mean()).item()
    assert result.iterates[1].improvement[0].value == pytest.approx(by_hand, abs=1e-5)
    assert reference["log_ratios"].abs().max() == 0  # the reference against itself


def test_killed_while_training_it_ends_bit_for_bit_where_it_would_have(
    models: dict[str, Path], whole: tuple[Path, IterativeResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = whole
    real, second = DirectTrainer.loss, []

    def fatal(self: DirectTrainer, *args: Any) -> Any:
        second.append("iteration-2" in str(self.args.output_dir))
        if sum(second) == 2:  # two epochs of however few pairs are two steps, and a checkpoint stands after the first
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(DirectTrainer, "loss", fatal)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path)
    assert list((tmp_path / "iteration-2").glob("checkpoint-*"))
    monkeypatch.setattr(DirectTrainer, "loss", real)
    assert run(models, tmp_path) == expected
    weights = [load_file(f / "iteration-2" / "model.safetensors") for f in (folder, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- relabelling ------------------------------------------------------------------------------------------------------


def test_pairs_leave_out_what_is_equal_or_cut_off_and_follow_the_scores(
    models: dict[str, Path], tmp_path: Path
) -> None:
    one = problem(models, tmp_path, "iterative.pair_prompts=2")
    numbers = torch.tensor([[0.0, 50.0, 0.0, 0.0], [0.0, 0.0, 60.0, 0.0]])
    ended = torch.tensor([[True, True, True, True], [True, False, True, True]])
    costs = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    texts = [["a", "b", "c", "c"], ["d", "e", "f", "g"]]
    found = Sampled(rewards=numbers, costs=costs, log_ratios=0 * numbers, ended=ended, texts=texts)
    one._pair_samples = lambda iteration: found  # type: ignore[method-assign]
    helpful = one.pairs((0.0,), 1)
    # (c, c) is equal and e was cut off: (a, b) and (f, g) stay. b's reward is 50 higher, f's 60 higher.
    assert [(p.responses[0].text, p.more_helpful, p.safer) for p in helpful] == [("a", 1, 0), ("f", 0, 1)]
    assert [r.safe for r in helpful[1].responses] == [False, True]
    # lam 100 on the cost: b costs 1 more, f 2 more.
    assert [p.more_helpful for p in one.pairs((100.0,), 1)] == [0, 1]


# --- constraints ------------------------------------------------------------------------------------------------------


def test_one_bound_a_category_by_hand() -> None:
    """Of four prompts one is of privacy: its gain counts fourfold, so that the mean over all is the category's."""
    prompts = [Prompt(text=str(i), category=PRIVACY if i == 1 else VIOLENCE) for i in range(4)]
    violence, privacy = (Taxonomy.load().primary_of(name) for name in (VIOLENCE, PRIVACY))
    both = Constraints.over({privacy: 2.0, violence: 1.0, "all": 0.5}, prompts)
    assert both.shares == (0.25, 0.75, 1.0)
    costs = torch.tensor([[3.0], [5.0], [6.0], [0.0]])
    gains = both.gains(costs, prompts)
    assert gains.shape == (4, 1, 3)
    # privacy: -5; violence: -(3 + 6 + 0)/3; all: -14/4
    assert gains.mean((0, 1)).tolist() == pytest.approx([-5.0, -3.0, -3.5])


def test_bounds_on_what_is_no_category_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"iterative\.bounds: \['violense'\].*primary categories"):
        Constraints.over({"violense": 1.0}, PROMPTS)
    absent = Taxonomy.load().primary_of(PRIVACY)
    with pytest.raises(SettingsError, match=f"none of 12 prompts is of '{absent}'"):
        Constraints.over({absent: 1.0}, PROMPTS)


# --- preference-based -------------------------------------------------------------------------------------------------


def test_preference_scores_are_log_ratios_of_the_two_policies(models: dict[str, Path]) -> None:
    reference, other = load_backbone(models["start"]), load_backbone(models["start"])
    with torch.no_grad():
        for parameter in other.get_decoder().parameters():
            parameter.mul_(1.05)
    encoder = Encoder(load_processor(models["start"]), config=reference.config)
    same, moved = (SeparateRoles(x, reference, {}, encoder) for x in (reference, other))
    inputs, responses = encoder.prompts(PROMPTS[:3]), encoder.responses(["I cannot", "first take", "help with that."])
    rewards, costs = PreferenceScorer(same, moved, 0.5)(PROMPTS[:3], inputs, responses)
    assert rewards.tolist() == [0.0] * 3
    expected = moved.logps(inputs, responses, "policy") - moved.logps(inputs, responses, "reference")
    by_hand = [-0.5 * row[mask].sum().item() for row, mask in zip(expected, responses.mask, strict=True)]
    assert costs.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert min(abs(x) for x in by_hand) > 1e-3
    # Features of another model, on the inputs, change nothing.
    other_features = PreferenceScorer(same, moved, 0.5)(PROMPTS[:3], replace(same.prepare(inputs)), responses)
    assert torch.allclose(other_features[1], costs, atol=1e-5)


def test_preference_based_runs_from_two_policies(
    models: dict[str, Path], whole: tuple[Path, IterativeResult], tmp_path: Path
) -> None:
    """pi_r and pi_g are the policies of the two iterations; the loop needs nothing else."""
    sources = (whole[0] / "iteration-1", whole[0] / "iteration-2")
    chosen = settings("iterative.algorithm=pecaid", "iterative.bounds=0.001", "iterative.iterations=1")
    one = ModelProblem(*of(chosen, "iterative"), tmp_path, models["start"], sources, PROMPTS)
    result = iterate(one, IterativeArguments(output_dir=tmp_path, iterations=1, bootstrap=100))
    assert result.one_shot.verdict == "optimal"
    assert len(result.iterates) == 1


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_repeat_with_their_seed_and_stand_in_prompt_order(models: dict[str, Path]) -> None:
    model = load_backbone(models["start"])
    encoder = Encoder(load_processor(models["start"]), config=model.config)
    roles = SeparateRoles(model, model, {}, encoder)

    def scorer(prompts: Any, inputs: Any, responses: Any) -> Any:
        numbers = torch.tensor([float(PROMPTS.index(p)) for p in prompts])
        return numbers, responses.mask.sum(1).float()

    arguments: dict[str, Any] = {"max_new_tokens": 6, "seed": 3, "device": "cpu"}
    first = draw(roles, scorer, PROMPTS[:5], 2, rows_at_once=4, **arguments)
    assert first.rewards.tolist() == [[float(i)] * 2 for i in range(5)]
    assert [len(row) for row in first.texts] == [2] * 5
    assert bool((first.ended == (first.costs < 6)).logical_or(first.costs == 6).all())
    assert bool((~first.ended[first.costs == 6]).any())  # some are cut off after 6 tokens
    again = draw(roles, scorer, PROMPTS[:5], 2, rows_at_once=4, **arguments)
    assert again.texts == first.texts
    assert draw(roles, scorer, PROMPTS[:5], 2, rows_at_once=4, **arguments | {"seed": 4}).texts != first.texts


# --- the command ------------------------------------------------------------------------------------------------------


def stage(models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    class Rows(list[Any]):
        def prompts(self) -> list[Prompt]:
            return PROMPTS

    monkeypatch.setattr(data, "comparisons", lambda *_: Rows())
    chosen = settings("data.path=given", f"output_dir={folder}", f"model.start={models['start']}", *more)
    chosen.iterative.reward_model, chosen.iterative.cost_model = str(models["reward"]), str(models["cost"])
    return STAGES["iterative"].run(chosen)


def test_the_stage_saves_the_best_iterate_and_names_it(
    models: dict[str, Path], whole: tuple[Path, IterativeResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole[0], tmp_path / "iterative")  # done before: the same settings, so nothing is trained again
    measured = stage(models, tmp_path, monkeypatch)
    best = whole[1].iterates[whole[1].best or 0]
    done = json.loads((tmp_path / "iterative" / "done.json").read_text())["measured"]
    assert (done["best_iteration"], done["feasible"]) == (best.iteration, best.shortfall <= 0)
    assert measured["improvement"]["all"] == best.improvement[0].value
    # The report's bound is absolute: the start model's mean cost less what was asked.
    mean = torch.load(whole[0] / "reference.pt")["costs"].double().mean().item()
    options = load_settings(
        None, [f"output_dir={tmp_path}", f"evaluation.model={tmp_path}/iterative", "iterative.bounds=0.2"]
    )
    constraint = constraint_of(options, -7.0, [])
    assert constraint["threshold"] == pytest.approx(mean - 0.2)
    assert constraint["final_multiplier"] == best.multipliers[0]
    saved, chosen = (
        load_backbone(tmp_path / "iterative" / x).state_dict() for x in (".", f"iteration-{best.iteration}")
    )
    assert all(torch.equal(saved[name], chosen[name]) for name in chosen)


def test_a_bound_out_of_reach_is_an_error_that_says_what_is_within(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=r"iterative\.bounds = 1000.* out of reach.*improve by \{'all': "):
        stage(models, tmp_path, monkeypatch, "iterative.bounds=1000")
    assert not (tmp_path / "iterative" / "done.json").exists()
    assert json.loads((tmp_path / "iterative" / "iterations.json").read_text())["one_shot"]["verdict"] == "infeasible"


def test_preference_based_asks_for_its_two_policies(models: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings(f"output_dir={tmp_path}", f"model.start={models['start']}", "iterative.algorithm=pecan")
    with pytest.raises(SettingsError, match=r"iterative\.helpful_policy is not set"):
        STAGES["iterative"].run(chosen)
