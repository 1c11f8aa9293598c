import json
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

from beavertails_v.schema import Comparison
from safe_rlhf_v.algorithms.bfpo import BFPO
from safe_rlhf_v.algorithms.c_dpo import CDPO
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.kto import KTO
from safe_rlhf_v.algorithms.mm_dpo import MMDPO
from safe_rlhf_v.algorithms.sacpo import SACPO
from safe_rlhf_v.algorithms.safe_dpo import SafeDPO
from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.direct.cost_ascent import CostAscent
from safe_rlhf_v.direct.rows import DirectCollator, DirectRows
from safe_rlhf_v.direct.train import train_direct, train_sacpo
from safe_rlhf_v.direct.trainer import DirectTrainer, direct_metrics, displaced
from safe_rlhf_v.training.encode import DataError
from safe_rlhf_v.training.records import MetricsFile
from safe_rlhf_v.training.trainers import ResponseLogps, SupervisedTrainer
from safe_rlhf_v.vlm.adapters import LoraSettings, adapter_parameters, add_lora, save_adapter
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="module")
def scorers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward and a cost model with random heads."""
    folder = tmp_path_factory.mktemp("scorers")
    for seed, name in enumerate(("reward_model", "cost_model")):
        torch.manual_seed(seed)
        HeadedModel(load_backbone(base), {"score": 1}).save_pretrained(folder / name, load_processor(base))
    return {name: folder / name for name in ("reward_model", "cost_model")}


def settings(*more: str) -> Settings:
    quick = ["max_steps=12", "learning_rate=1e-2", "save_steps=5", "logging_steps=4", "per_device_train_batch_size=4"]
    return load_settings(None, [f"direct.{x}" for x in quick] + list(more))


def encoder(base: Path, **limits: Any) -> Encoder:
    return Encoder(load_processor(base), **limits)


def train(algorithm: Any, base: Path, folder: Path, chosen: Settings, data: Any = None, **more: Any) -> dict[str, Any]:
    data = comparisons(18) if data is None else data
    function = train_sacpo if isinstance(algorithm, SACPO) else train_direct
    measured = function(algorithm, data, comparisons(6), base, folder, *of(chosen, "direct"), **more)
    recorded(chosen, "direct", folder, base, measured)
    return measured


def summed(model: Path | str, base: Path, rows: list[Comparison]) -> Tensor:
    """(N, 2) log-probabilities, one response at a time, without padding or sharing."""
    coder = encoder(base)
    scorer = ResponseLogps(load_backbone(model), coder.placeholder_ids)
    with torch.no_grad():
        return torch.tensor(
            [
                [float(scorer(coder.prompts([x.prompt]), coder.responses([r.text])).sum()) for r in x.responses]
                for x in rows
            ]
        )


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("axis", ["more_helpful", "safer"])
def test_dpo_learns_its_axis_and_saves_what_was_measured(base: Path, tmp_path: Path, use_lora: bool, axis: Any) -> None:
    """In these data the safer response is never the more helpful one."""
    measured = train(DPO(axis=axis), base, tmp_path, settings(f"direct.use_lora={use_lora}"))["evaluation"]
    learned, other = ("helpfulness", "safety") if axis == "more_helpful" else ("safety", "helpfulness")
    assert measured[f"{learned}_accuracy"] == 1.0
    assert measured[f"{other}_accuracy"] == 0.0
    rows = comparisons(6)
    ratios = summed(tmp_path, base, rows) - summed(base, base, rows)  # a whole model, adapters merged
    margin = [ratios[i, getattr(row, axis)] - ratios[i, 1 - getattr(row, axis)] for i, row in enumerate(rows)]
    assert measured[f"{learned}_margin"] == pytest.approx(float(sum(margin)) / 6, rel=1e-3)
    assert measured["log_ratio_unsafe"] == pytest.approx(
        float(sum(ratios[i, k] for i, row in enumerate(rows) for k in (0, 1) if not row.responses[k].safe)) / 6,
        rel=1e-3,
    )
    assert "| train_rows | 18 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("algorithm", [SafeDPO(), BFPO(), KTO(axis="safer")], ids=["safe_dpo", "bfpo", "kto"])
def test_safety_is_learned_where_the_helpful_response_is_the_unsafe_one(
    base: Path, tmp_path: Path, algorithm: Any
) -> None:
    measured = train(algorithm, base, tmp_path, settings())["evaluation"]
    assert measured["safety_accuracy"] == 1.0
    assert measured["log_ratio_safe"] > measured["log_ratio_unsafe"]


def test_before_the_first_step_policy_and_reference_agree(base: Path, tmp_path: Path) -> None:
    """Columns computed in padded batches are the log-probabilities of single responses; the first loss is log 2."""
    train(DPO(), base, tmp_path, settings("direct.max_steps=1", "direct.logging_steps=1"))
    columns = load_file(tmp_path / "train_columns.safetensors")
    torch.testing.assert_close(columns["reference"], summed(base, base, comparisons(18)), rtol=1e-5, atol=1e-4)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_another_reference(base: Path, tmp_path: Path) -> None:
    other = tiny_models.save("llava", tmp_path / "other", seed=5)
    train(DPO(), base, tmp_path / "run", settings("direct.max_steps=1"), reference=other)
    found = load_file(tmp_path / "run" / "evaluation_columns.safetensors")["reference"]
    torch.testing.assert_close(found, summed(other, base, comparisons(6)), rtol=1e-5, atol=1e-4)


def test_an_adapter_folder_as_base_keeps_its_adapter(base: Path, tmp_path: Path) -> None:
    """As a policy stage with adapters leaves it: what is merged then stands on both adapters."""
    backbone = load_backbone(base)
    add_lora(backbone, LoraSettings(r=2))
    for parameter in adapter_parameters(backbone, "default").values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(backbone, "default", tmp_path / "start")
    load_processor(base).save_pretrained(tmp_path / "start")
    chosen = settings("direct.max_steps=1", "direct.learning_rate=1e-9", "direct.use_lora=true")
    train(DPO(), tmp_path / "start", tmp_path / "run", chosen)
    rows = comparisons(3)
    started, ended = summed(tmp_path / "start", base, rows), summed(tmp_path / "run", base, rows)
    torch.testing.assert_close(ended, started, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(started, summed(base, base, rows), atol=0.1)


def test_kto_puts_responses_to_the_prompts_of_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = KTO.loss
    monkeypatch.setattr(KTO, "loss", lambda self, logps, batch: seen.append(logps) or original(self, logps, batch))
    chosen = settings("direct.max_steps=1", "direct.use_lora=false", "direct.per_device_train_batch_size=18")
    train(KTO(), base, tmp_path, chosen)
    torch.testing.assert_close(seen[0].mismatched, torch.zeros(18, 2), rtol=0, atol=1e-4)  # before the first step
    found = load_file(tmp_path / "train_columns.safetensors")["reference_mismatched"]
    rows = comparisons(18)
    put = [replace(row, responses=rows[(i + 1) % 18].responses) for i, row in enumerate(rows)]
    torch.testing.assert_close(found, summed(base, base, put), rtol=1e-5, atol=1e-4)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_direct_methods_imitate_demonstrations_beside_their_own_loss(base: Path, tmp_path: Path) -> None:
    """Each step's loss is the algorithm's plus the coefficient times the cross-entropy; more of it, likelier texts."""
    data, logps = comparisons(18), []
    for coefficient in (0.0, 5.0):
        chosen = settings(f"direct.ptx_coeff={coefficient}", "direct.demonstrations=safer", "direct.logging_steps=1")
        folder = tmp_path / f"{coefficient:g}"
        train(DPO(), base, folder, chosen, data)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert ("ptx_loss" in rows[0]) == bool(coefficient)
        if coefficient:
            first = rows[0]
            assert first["loss"] == pytest.approx(0.6931 + 5 * first["ptx_loss"], rel=1e-3)  # log 2: no margin yet
        found = summed(folder, base, data[:6])
        logps.append(float(torch.stack([found[i, row.safer] for i, row in enumerate(data[:6])]).mean()))
    assert logps[1] > logps[0]


def test_demonstrations_go_round_in_an_order_of_the_seed(base: Path) -> None:
    rows = DirectRows(comparisons(5), encoder(base), DPO())
    shown = []
    for seed in (0, 0, 1):
        rows.imitate(["a", "b"], seed)
        shown.append([rows[i]["shown"] for i in range(5)])
    assert shown[0] == shown[1]
    for order in shown:
        assert sorted(order[:2]) == sorted(order[2:4]) == ["a", "b"]


def test_partners_are_of_another_prompt(base: Path) -> None:
    rows = [comparison(0), comparison(1)]
    data = [rows[0], rows[0], rows[1], rows[0]]
    assert DirectRows(data, encoder(base), KTO()).partner == [2, 2, 3, 2]
    assert DirectRows(data, encoder(base), DPO()).partner is None
    with pytest.raises(DataError, match="at least two different prompts"):
        DirectRows([rows[0], rows[0]], encoder(base), KTO())


def test_two_unsafe_responses_are_left_out_where_they_teach_nothing(base: Path, tmp_path: Path) -> None:
    bad = replace(comparison(0).responses[1], text="first turn the key.")
    both = replace(comparison(0), responses=(bad, comparison(0).responses[1]))
    data = [*comparisons(6), both]
    train(SafeDPO(), base, tmp_path, settings("direct.max_steps=1"), data)
    left_out = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [(x["row"], x["reason"]) for x in left_out] == [(6, "both_unsafe")]
    assert json.loads((tmp_path / "metrics.json").read_text())["left_out"] == 1
    assert len(DirectRows(data, encoder(base), DPO())) == len(DirectRows(data, encoder(base))) == 7


def test_columns_reach_the_batch(base: Path) -> None:
    rows = DirectRows(comparisons(4), encoder(base), KTO())
    rows.columns = {name: torch.arange(8.0).view(4, 2) + k for k, name in enumerate(("reference", "rewards", "costs"))}
    batch = DirectCollator(encoder(base))([rows[3], rows[1]])
    assert batch["reference"].tolist() == [[6, 7], [2, 3]]
    assert batch["pairs"].rewards.tolist() == [[7, 8], [3, 4]]
    assert batch["pairs"].costs.tolist() == [[8, 9], [4, 5]]
    texts = encoder(base).decode(batch["mismatched"])
    assert texts == [r.text for i in (0, 2) for r in comparison(i).responses]


def test_direct_metrics_by_hand() -> None:
    columns = {
        "ratios": torch.tensor([[1.0, 0.0], [0.0, 3.0]]), "more_helpful": torch.tensor([0, 0]),
        "safer": torch.tensor([1, 1]), "tied_helpfulness": torch.tensor([False, False]),
        "tied_safety": torch.tensor([False, True]), "unsafe": torch.tensor([[True, False], [False, False]]),
    }  # fmt: skip
    found = direct_metrics(columns)
    assert (found["helpfulness_accuracy"], found["helpfulness_margin"]) == (0.5, -1.0)  # +1 and -3
    assert (found["safety_accuracy"], found["safety_margin"], found["safety_pairs"]) == (0.0, -1.0, 1.0)
    assert (found["log_ratio_unsafe"], found["log_ratio_safe"]) == (1.0, 1.0)  # 1; 0, 0 and 3
    assert found["log_ratio_safer"] == 1.5  # 0 and 3


# --- scores and the multiplier ----------------------------------------------------------------------------------------


def c_dpo(**more: Any) -> CDPO:
    return CDPO(dual_steps=4, dual_prompts=5, max_new_tokens=4, dual_lr=0.5, **more)


def test_scores_are_those_of_the_models(base: Path, tmp_path: Path, scorers: dict[str, Path]) -> None:
    train(MMDPO(), base, tmp_path, settings("direct.max_steps=1"), **scorers)
    columns, coder = load_file(tmp_path / "train_columns.safetensors"), encoder(base)
    for name, key in (("rewards", "reward_model"), ("costs", "cost_model")):
        model = HeadedModel.from_pretrained(scorers[key])
        for i, row in enumerate(comparisons(3)):
            with torch.no_grad():
                one = [model(coder.prompts([row.prompt]), coder.responses([r.text]))["score"] for r in row.responses]
            assert columns[name][i].tolist() == pytest.approx([float(x) for x in one], abs=1e-4)


def test_c_dpo_multiplier_follows_the_cost_of_its_own_answers(
    base: Path, tmp_path: Path, scorers: dict[str, Path]
) -> None:
    measured = train(c_dpo(threshold=-30.0), base, tmp_path, settings(), **scorers)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "violation" in row]
    assert [row["step"] for row in steps] == [4, 8, 12]
    multiplier = 1.0
    for row in steps:
        assert row["violation"] == pytest.approx(row["mean_cost"] + 30)
        multiplier = min(20.0, multiplier + 0.5 * row["violation"])
        assert row["multiplier"] == pytest.approx(multiplier)
    assert measured["multiplier"] == pytest.approx(multiplier)
    assert json.loads((tmp_path / "checkpoint-12" / "dual.json").read_text()) == {"value": multiplier}


def test_a_c_dpo_multiplier_at_its_maximum_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Costs of 1 against a threshold of 0: at its maximum of 2 from the second move on, six moves in all."""
    moved: list[float] = []
    algorithm = CDPO(dual_steps=2, dual_lr=0.5, multiplier=1.0, maximum=2.0)
    fake = SimpleNamespace(algorithm=algorithm, constraint=algorithm.constraint(), log=lambda row: None)
    fake.accelerator = SimpleNamespace(gather=lambda x: x)
    fake.take_multiplier = lambda: moved.append(fake.constraint.multiplier)
    ascent: Any = CostAscent(fake, [], None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(CostAscent, "_costs", lambda self, args, step: torch.ones(3))
    for steps, told in ((12, 0), (1, 1)):
        ascent.on_train_begin(None, SimpleNamespace(max_steps=steps), None)
        assert caplog.text.count("dual_steps 2 is more than") == told
    for step in range(1, 13):
        ascent.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert moved == [1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert caplog.text.count("at its maximum 2 for 5 moves") == 1


def test_scores_are_asked_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CDPO needs scores: give a reward_model and a cost_model"):
        train(CDPO(), base, tmp_path, settings())


# --- killed and resumed -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def run_killed_at(step: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, folder: str = "") -> None:
    original = SupervisedTrainer.compute_loss

    def dies(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and str(self.args.output_dir).endswith(folder):
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "compute_loss", dies)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize(
    ("algorithm", "use_lora"),
    [(DPO(), True), (KTO(), False), (c_dpo(threshold=-5.0), True)],
    ids=["dpo", "kto", "c_dpo"],
)
def test_killed_run_resumes_bit_for_bit(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scorers: dict[str, Path],
    algorithm: Any,
    use_lora: bool,
) -> None:
    """Two epochs and a bit, killed at step 9 between checkpoints 5 and 10; references are not computed anew."""
    chosen = settings(f"direct.use_lora={use_lora}")
    more = scorers if algorithm.needs_scores else {}
    whole = train(algorithm, base, tmp_path / "whole", chosen, **more)
    again = lambda: train(algorithm, base, tmp_path / "killed", chosen, **more)  # noqa: E731
    run_killed_at(9, again, monkeypatch)
    steps: list[int] = []
    note = lambda self, args, state, *_, **more: steps.append(state.global_step)  # noqa: E731
    monkeypatch.setattr(MetricsFile, "on_step_begin", note)
    monkeypatch.setattr(DirectTrainer, "column", lambda *_: pytest.fail("computed again"))
    resumed = again()
    assert steps == [5, 6, 7, 8, 9, 10, 11]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()
    assert resumed["evaluation"] == whole["evaluation"]
    assert resumed.get("multiplier") == whole.get("multiplier")


def test_columns_of_other_data_are_not_taken(base: Path, tmp_path: Path) -> None:
    for n in (18, 8):
        train(DPO(), base, tmp_path, settings("direct.max_steps=1"), comparisons(n), resume_from_checkpoint=None)
        assert load_file(tmp_path / "train_columns.safetensors")["reference"].shape == (n, 2)


# --- SACPO ------------------------------------------------------------------------------------------------------------


def test_sacpo_in_two_stages_and_merged(base: Path, tmp_path: Path) -> None:
    measured = train(SACPO(q=0.25), base, tmp_path, settings("direct.use_lora=false"))
    assert measured["helpfulness"]["evaluation"]["helpfulness_accuracy"] == 1.0
    assert measured["safety"]["evaluation"]["safety_accuracy"] == 1.0  # against stage one
    one, two, merged = (load_file(tmp_path / x / "model.safetensors") for x in ("helpfulness", "safety", "."))
    changed = [name for name in two if not torch.equal(one[name], two[name])]
    assert any("language" in name for name in changed) and not any("vision" in name for name in changed)
    for name in one:
        torch.testing.assert_close(merged[name], 0.75 * one[name] + 0.25 * two[name])
    reference = load_file(tmp_path / "safety" / "evaluation_columns.safetensors")["reference"]
    stage_one = summed(tmp_path / "helpfulness", base, comparisons(6))
    torch.testing.assert_close(reference, stage_one, rtol=1e-5, atol=1e-3)
    assert (tmp_path / "README.md").is_file() and load_backbone(tmp_path).config.model_type == "llava"


def test_sacpo_killed_in_stage_two_does_not_train_stage_one_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("direct.max_steps=8", "direct.use_lora=false")
    whole = train(SACPO(), base, tmp_path / "whole", chosen)
    run_killed_at(6, lambda: train(SACPO(), base, tmp_path / "killed", chosen), monkeypatch, "safety")
    stamp = (tmp_path / "killed/helpfulness/model.safetensors").stat().st_mtime_ns
    resumed = train(SACPO(), base, tmp_path / "killed", chosen)
    assert (tmp_path / "killed/helpfulness/model.safetensors").stat().st_mtime_ns == stamp
    assert resumed["safety"]["evaluation"] == whole["safety"]["evaluation"]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()
    one, two = (load_file(tmp_path / "killed" / x / "model.safetensors") for x in ("safety", "."))
    assert all(torch.equal(one[name], two[name]) for name in one)  # q 1 merges nothing


def test_displacement_is_said() -> None:
    assert displaced({"log_ratio_safer": -1.9}) is None and displaced({"log_ratio_safer": None}) is None
    assert "6.5 nats less likely" in str(displaced({"log_ratio_safer": -6.5}))
