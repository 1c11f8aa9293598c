import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from comparisons import comparison, comparisons
from safetensors.torch import load_file
from sections import of, recorded
from torch import Tensor

from beavertails_v.schema import Comparison, LabelledResponse, Response
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.console import show_logs
from safe_rlhf_v.training import trainers
from safe_rlhf_v.training.checkpoint import CheckpointError, latest_checkpoint
from safe_rlhf_v.training.encode import DataError, PairCollator, interleaved, pair_rows, response_rows
from safe_rlhf_v.training.preference_metrics import cost_metrics, reward_metrics
from safe_rlhf_v.training.records import MetricsFile
from safe_rlhf_v.training.supervised import train_preference_model, train_sft
from safe_rlhf_v.training.trainers import PreferenceTrainer, ResponseLogps, SupervisedTrainer
from safe_rlhf_v.types import Responses
from safe_rlhf_v.vlm.backbone import freeze_vision, load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, join, load_processor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("base") / "llava")


def settings(stage: str, *more: str) -> Settings:
    quick = ["max_steps=12", "learning_rate=1e-2", "save_steps=5", "logging_steps=4", "per_device_train_batch_size=4"]
    return load_settings(None, [f"{stage}.{x}" for x in quick] + list(more))


def encoder(base: Path, **limits: Any) -> Encoder:
    return Encoder(load_processor(base), **limits)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_cost_model_learns_ranking_and_sign(base: Path, tmp_path: Path) -> None:
    measured = train_preference_model(
        "cost", comparisons(24), comparisons(8), base, tmp_path, *of(settings("cost"), "cost")
    )
    assert measured["evaluation"]["accuracy"] == 1.0
    assert measured["evaluation"]["sign_accuracy"] == 1.0
    assert measured["train_sample"]["mean_cost_safe"] < 0 < measured["train_sample"]["mean_cost_unsafe"]
    model = HeadedModel.from_pretrained(tmp_path)
    batch = PairCollator(encoder(base))(comparisons(8))["pairs"]
    with torch.no_grad():
        costs = model(batch.prompts.repeat(2), interleaved(batch.responses))["score"].view(-1, 2)
    # The folder holds what was measured: the scores of the last evaluation, from the reloaded model.
    rows = [json.loads(line) for line in (tmp_path / "evaluation_scores.jsonl").read_text().splitlines()]
    torch.testing.assert_close(costs, torch.tensor([row["scores"] for row in rows]), rtol=1e-5, atol=1e-5)
    assert [row["safer"] for row in rows] == batch.safer.tolist()
    sample = [json.loads(line) for line in (tmp_path / "train_scores.jsonl").read_text().splitlines()]
    safe = [c for row in sample for c, unsafe in zip(row["scores"], row["unsafe"], strict=True) if not unsafe]
    assert sum(safe) / len(safe) == pytest.approx(measured["train_sample"]["mean_cost_safe"])
    assert [row["prompt_id"] for row in rows] == [pair.prompt.id for pair in comparisons(8)]


def test_reward_model_learns_the_other_preference(base: Path, tmp_path: Path) -> None:
    chosen = of(settings("reward"), "reward")
    measured = train_preference_model("reward", comparisons(24), comparisons(8), base, tmp_path, *chosen)
    recorded(settings("reward"), "reward", tmp_path, base, measured)
    assert measured["evaluation"]["accuracy"] == 1.0
    assert "sign_accuracy" not in measured["evaluation"]
    card = (tmp_path / "README.md").read_text()
    assert str(base) in card
    assert "| train_rows | 24 |" in card
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 12, 12]  # three logs, the run's summary, the evaluation
    assert load_settings(tmp_path / "settings.yaml") == settings("reward")


@pytest.mark.parametrize("use_lora", [False, True])
def test_sft_learns_the_picked_responses(base: Path, tmp_path: Path, use_lora: bool) -> None:
    chosen = settings("sft", f"sft.use_lora={use_lora}", "sft.responses=safer", "sft.max_steps=25")
    measured = train_sft(comparisons(24), comparisons(8), base, tmp_path, *of(chosen, "sft"))
    model = load_backbone(tmp_path)  # a whole model, adapters merged

    def loss(model: Any, pick: str) -> float:
        rows = response_rows(comparisons(8), pick, encoder(base))  # type: ignore[arg-type]
        batch = trainers_collate(base, rows)
        logps = ResponseLogps(model, encoder(base).placeholder_ids)(batch["prompts"], batch["responses"])
        return -logps[batch["responses"].mask].mean().item()

    assert loss(model, "safer") == pytest.approx(measured["evaluation"]["loss"], rel=1e-3)
    assert loss(model, "safer") < 0.7 * loss(load_backbone(base), "safer")
    assert loss(model, "more_helpful") > loss(model, "safer")


def trainers_collate(base: Path, rows: Any) -> dict[str, Any]:
    from safe_rlhf_v.training.encode import ResponseCollator

    return ResponseCollator(encoder(base))([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("frozen", [True, False])
def test_vision_tower_trains_only_when_asked(base: Path, tmp_path: Path, frozen: bool) -> None:
    chosen = settings("sft", f"sft.freeze_vision={frozen}", "sft.max_steps=2")
    train_sft(comparisons(8), comparisons(4), base, tmp_path, *of(chosen, "sft"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision" in name for name in changed) is not frozen
    assert any("language" in name for name in changed)


# --- the forward ------------------------------------------------------------------------------------------------------


def test_response_logps_are_those_of_the_plain_model_on_response_tokens(base: Path) -> None:
    model, coder = load_backbone(base), encoder(base)
    batch = trainers_collate(base, response_rows(comparisons(3), "all", coder))
    logps = ResponseLogps(model, coder.placeholder_ids)(batch["prompts"], batch["responses"])
    logits = model(**join(batch["prompts"], batch["responses"])).logits[:, batch["prompts"].input_ids.shape[1] - 1 : -1]
    logits[..., list(coder.placeholder_ids)] = float("-inf")
    expected = logits.log_softmax(-1).gather(-1, batch["responses"].ids[..., None]).squeeze(-1)
    mask = batch["responses"].mask
    torch.testing.assert_close(logps[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_pair_scores_equal_those_of_single_responses(base: Path, tmp_path: Path, frozen: bool) -> None:
    """One forward of 2B padded rows, features shared, gives what 2B forwards of one row give, in data-set order."""
    backbone, coder = load_backbone(base), encoder(base)
    if frozen:
        freeze_vision(backbone)
    model = HeadedModel(backbone, {"score": 1}).eval()
    rows = comparisons(3)
    trainer = make_trainer(model, tmp_path, PairCollator(coder))
    scores = trainer.scores(model, PairCollator(coder)(rows))
    for i, row in enumerate(rows):
        for k in (0, 1):
            alone = model(coder.prompts([row.prompt]), coder.responses([row.responses[k].text]))["score"]
            assert scores[i, k].item() == pytest.approx(alone.item(), abs=1e-5)


def make_trainer(model: HeadedModel, folder: Path, collator: PairCollator) -> PreferenceTrainer:
    from safe_rlhf_v.algorithms.reward_model import RewardModel
    from safe_rlhf_v.training.supervised import training_arguments

    arguments = training_arguments(load_settings().reward, folder, 0)
    return PreferenceTrainer(model, arguments, algorithm=RewardModel(), kind="reward", data_collator=collator)


def test_pads_of_the_shorter_response_are_not_masked_in() -> None:
    short = Responses(ids=torch.tensor([[5, 6]]), mask=torch.tensor([[True, True]]))
    long = Responses(ids=torch.tensor([[7, 8, 9]]), mask=torch.tensor([[True, True, True]]))
    both = interleaved((short, long))
    assert both.ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert both.mask.tolist() == [[True, True, False], [True, True, True]]


def test_loss_that_is_not_finite_stops_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "token_cross_entropy", lambda logps, mask: logps.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan: lower learning_rate"):
        train_sft(comparisons(8), comparisons(4), base, tmp_path, *of(settings("sft"), "sft"))


def test_quantized_weights_do_not_train(base: Path, tmp_path: Path) -> None:
    chosen = of(settings("sft", "model.quantization=4bit"), "sft")
    with pytest.raises(SettingsError, match="needs use_lora: true"):
        train_sft(comparisons(4), comparisons(4), base, tmp_path, *chosen)


def test_metrics_go_on_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 4, "loss": 1.0}\n{"step": 8, "loss": 0.5}\n{"step": 9, "lo')
    MetricsFile(file).on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=5), None)
    assert file.read_text() == '{"step": 4, "loss": 1.0}\n'


# --- killed and resumed -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def run_killed_at(step: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = SupervisedTrainer.compute_loss

    def dies(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "compute_loss", dies)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize("stage", ["sft", "cost"])
def test_killed_run_resumes_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs and a bit, dropout on, killed at step 8 between the checkpoints of steps 5 and 10."""
    chosen = settings(stage, f"{stage}.use_lora=true", "model.lora.dropout=0.2")

    def run(folder: Path) -> Callable[[], Any]:
        if stage == "sft":
            return lambda: train_sft(comparisons(18), comparisons(4), base, folder, *of(chosen, "sft"))
        return lambda: train_preference_model(
            "cost", comparisons(18), comparisons(4), base, folder, *of(chosen, "cost")
        )

    whole = run(tmp_path / "whole")()
    run_killed_at(8, run(tmp_path / "killed"), monkeypatch)
    assert latest_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-5"
    (tmp_path / "killed" / "checkpoint-7").mkdir()  # one whose writing was cut short
    steps: list[int] = []
    note = lambda self, args, state, *_, **more: steps.append(state.global_step)  # noqa: E731
    monkeypatch.setattr(MetricsFile, "on_step_begin", note)
    show_logs()
    capsys.readouterr()
    resumed = run(tmp_path / "killed")()
    said = capsys.readouterr().out
    assert f"{stage}: resumed at step 5 of 12" in said and f"{stage} step 8 of 12: loss" in said
    assert re.search(rf"{stage} step 8 of 12: .*  \d\d:\d\d left\n", said) and not re.search("12 of 12: .* left", said)
    assert steps == [5, 6, 7, 8, 9, 10, 11]  # went on, did not start again
    name = "adapter/adapter_model.safetensors" if stage == "sft" else "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert resumed["evaluation"] == whole["evaluation"]
    runs = [rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    logged = [[(row["step"], row["loss"]) for row in run if "loss" in row] for run in runs]
    assert [step for step, _ in logged[1]] == [4, 8, 12]
    assert logged[0][-1] == logged[1][-1] != logged[0][0]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_checkpoint_of_other_settings_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(lora: bool) -> Callable[[], Any]:
        chosen = settings("cost", f"cost.use_lora={lora}")
        return lambda: train_preference_model(
            "cost", comparisons(8), comparisons(4), base, tmp_path, *of(chosen, "cost")
        )

    run_killed_at(6, run(True), monkeypatch)
    with pytest.raises(CheckpointError, match="checkpoint-5 does not fit this model"):
        run(False)()


def test_checkpoints_hold_nothing_frozen(base: Path, tmp_path: Path) -> None:
    train_preference_model("cost", comparisons(8), comparisons(4), base, tmp_path, *of(settings("cost"), "cost"))
    names = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert all(".lora_" in name or name.startswith("heads.") for name in names)


# --- rows -------------------------------------------------------------------------------------------------------------


def with_texts(row: Comparison, first: str, second: str) -> Comparison:
    texts = (first, second)
    return replace(row, responses=tuple(replace(r, text=t) for r, t in zip(row.responses, texts, strict=True)))


def test_rows_that_cannot_be_encoded_are_left_out_and_named(base: Path) -> None:
    spelt = replace(comparison(1), prompt=replace(comparison(1).prompt, text="what is <image> ?"))
    same, long = with_texts(comparison(2), "same", "same"), with_texts(comparison(3), "a b " * 50, "c")
    data = [comparison(0), spelt, same, long]
    kept = pair_rows(data, encoder(base, max_response_length=40))
    assert len(kept) == 1
    assert [(x.row, x.reason) for x in kept.left_out] == [
        (1, "SpecialTokenInText"),
        (2, "identical"),
        (3, "ResponseTooLong"),
    ]
    assert len(response_rows(data[:1], "all", encoder(base, max_prompt_length=400))) == 2
    with pytest.raises(DataError, match="PromptTooLong"):
        response_rows(data[:1], "all", encoder(base, max_prompt_length=5))


@pytest.mark.parametrize(("pick", "texts"), [("safer", ["I cannot"] * 2), ("more_helpful", ["first ta"] * 2)])
def test_responses_are_picked_by_their_labels(base: Path, pick: Any, texts: list[str]) -> None:
    picked = response_rows(comparisons(2), pick, encoder(base))
    assert [picked[i].response.text[:8] for i in range(2)] == texts


def test_responses_preferred_on_both_axes(base: Path) -> None:
    """The axes of every comparison here disagree; turned round in one, its safer response is on both."""
    agreeing = replace(comparison(1), more_helpful=comparison(1).safer)
    rows = response_rows([comparison(0), agreeing], "both", encoder(base))
    assert [row.response for row in (rows[i] for i in range(len(rows)))] == [agreeing.responses[agreeing.safer]]
    assert [(x.row, x.reason) for x in rows.left_out] == [(0, "AxesDisagree")]


def test_single_responses_are_taken_as_they_are(base: Path) -> None:
    row = LabelledResponse(prompt=comparison(0).prompt, response=Response(text="yes", safe=True))
    assert response_rows([row], "safer", encoder(base))[0] is row


def test_harmless_rates_graded_or_not(base: Path) -> None:
    ungraded = replace(comparison(0), responses=(Response(text="a", safe=False), Response(text="b", safe=True)))
    data = [comparison(2), comparison(1), ungraded]
    graded, plain = (PairCollator(encoder(base), graded=g)(data)["pairs"].harmless_rate for g in (True, False))
    assert graded.tolist() == [[1, -3], [-2, 1], [-1, 1]]
    assert plain.tolist() == [[1, -1], [-1, 1], [-1, 1]]


# --- metrics, by hand -------------------------------------------------------------------------------------------------


def labels(**columns: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in columns.items()}


def test_reward_metrics_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 3.0], [2.0, 2.0], [0.0, 5.0]])
    found = reward_metrics(scores, labels(more_helpful=[0, 0, 1, 0], tied_helpfulness=[False, False, False, True]))
    assert found["accuracy"] == pytest.approx(1.5 / 3)  # right, wrong, equal scores: 1 + 0 + 1/2
    assert found["accuracy_tied"] == 0
    assert found["margin"] == pytest.approx((1 - 2 + 0) / 3)
    assert (found["pairs"], found["pairs_tied"]) == (3, 1)


def test_cost_metrics_by_hand() -> None:
    scores = torch.tensor([[-1.0, 2.0], [0.5, -2.0]])
    unsafe = [[False, True], [False, True]]  # costs: safe -1 and .5, unsafe 2 and -2
    found = cost_metrics(scores, labels(safer=[0, 0], tied_safety=[False, False], unsafe=unsafe))
    assert found["accuracy"] == 0.5  # pair 0: the unsafer costs more; pair 1: less
    assert found["sign_accuracy"] == 0.5  # -1 and 2 right, .5 and -2 wrong
    assert found["balanced_accuracy"] == 0.5
    assert found["auc"] == 0.5  # 2 beats both, -2 none: 2 of 4
    assert (found["mean_cost_unsafe"], found["mean_cost_safe"], found["mean_cost_safer"]) == (0.0, -0.25, -0.25)


def test_metrics_of_nothing_are_unknown_not_zero() -> None:
    scores = torch.tensor([[1.0, 0.0]])
    found = cost_metrics(scores, labels(safer=[1], tied_safety=[True], unsafe=[[True, True]]))
    assert (found["accuracy"], found["auc"], found["balanced_accuracy"], found["mean_cost_safe"]) == (None,) * 4
    assert found["accuracy_tied"] == 1.0
