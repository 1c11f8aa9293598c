import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import error, run

from beavertails_v import Prompt
from beavertails_v.picture_world import vocabulary, write
from safe_rlhf_v.algorithms.bfpo import BFPO
from safe_rlhf_v.algorithms.c_dpo import CDPO
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.kto import KTO
from safe_rlhf_v.algorithms.mm_dpo import MMDPO
from safe_rlhf_v.algorithms.sacpo import SACPO
from safe_rlhf_v.algorithms.safe_dpo import SafeDPO
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.generation import Sampling
from safe_rlhf_v.stages import data, evaluate
from safe_rlhf_v.stages.answering import Scoring
from safe_rlhf_v.stages.folder import run_stage
from safe_rlhf_v.stages.identity import identity
from safe_rlhf_v.stages.report_constraint import bounded_instead
from safe_rlhf_v.stages.report_notes import leakage_notes
from safe_rlhf_v.stages.threshold import threshold
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor

TINY = """
output_dir: {folder}/run
model: {{path: {folder}/base}}
data: {{path: {folder}/data}}
sft: {{max_steps: 3, learning_rate: 1e-3, freeze_vision: false}}
reward: {{max_steps: 3}}
cost: {{max_steps: 3}}
guard: {{max_steps: 3}}
direct: {{max_steps: 2, c_dpo: {{dual_steps: 1, dual_prompts: 2, max_new_tokens: 4}}}}
policy:
  max_steps: 2
  threshold: auto
  max_new_tokens: 6
  num_generations: 2
  per_device_train_batch_size: 2
  save_steps: 1
  guidance_rollouts: 1
generation: {{max_new_tokens: 6}}
evaluation: {{bootstrap: 100}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of a few pairs, a tiny model of it, and settings."""
    folder = tmp_path_factory.mktemp("run")
    write(folder / "data", train=24, evaluation=12)
    model, processor = tiny_llava(vocabulary(), hidden_size=16, layers=2, vision_layers=1, heads=2)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    (folder / "run.yaml").write_text(TINY.format(folder=folder))
    return folder


def done(folder: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / stage / "done.json").read_text()))


def test_a_mistyped_path_does_not_lock_the_folder(folder: Path, tmp_path: Path) -> None:
    config = ("--config", folder / "run.yaml", f"output_dir={tmp_path}", "sft.max_steps=1")
    assert "nowhere" in error("train", "sft", *config, f"data.path={folder / 'nowhere'}")
    assert not (tmp_path / "sft" / "stage.json").exists()
    result = run("train", "sft", *config)
    assert result.exit_code == 0, result.output
    assert "made with other settings" in error("train", "sft", *config, "sft.max_steps=2")


def test_every_stage_from_data_to_report(folder: Path) -> None:
    """The road of a real run, in the order a user takes it, on a world and a model that are small."""
    config = ("--config", folder / "run.yaml")
    missing = error("train", "policy", *config)
    assert "holds no finished reward model: run `safe-rlhf-v train reward` first" in missing
    for stage in ("sft", "reward", "cost", "guard", "policy"):
        result = run("train", stage, *config)
        assert result.exit_code == 0, result.output
        assert (folder / "run" / stage / "README.md").is_file()
    assert done(folder, "reward")["measured"]["train_rows"] == 24
    assert json.loads((folder / "run" / "reward" / "stage.json").read_text())["start"] == str(folder / "run" / "sft")
    mean = done(folder, "cost")["measured"]["train_sample"]["mean_cost_safe"]
    assert done(folder, "policy")["measured"]["threshold"] == pytest.approx(mean)

    result = run("evaluate", *config)
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["judge"]["kind"] == "truth"
    assert (folder / "run" / "evaluation" / "left_out.jsonl").is_file()  # beside what is of an evaluation, not of all
    assert not (folder / "run" / "left_out.jsonl").exists()
    assert "next: safe-rlhf-v generate" in result.output
    assert report["constraint"]["threshold"] == pytest.approx(mean)
    assert report["reward_model"]["n_pairs"] == 12
    assert len(report["guard_rounds"]) == 6
    assert set(report["seconds"]) >= {"sft", "reward", "cost", "guard", "policy", "evaluation", "total"}

    assert report["notes"] == []
    few = ("data.evaluation_limit=3", "evaluation.guard_rounds=false")
    assert run("evaluate", *config, "data.evaluation_split=train", *few).exit_code == 0
    for name in ("report.json", "report.html"):
        assert "Leakage: 3 of 3 evaluation prompts" in (folder / "run" / name).read_text()

    again = run("train", "cost", *config)
    assert "done before" in again.output
    changed = error("train", "cost", *config, "cost.learning_rate=1")
    assert "cost.learning_rate (3e-05 then, 1.0 now)" in changed
    assert "--overwrite" in changed

    picture = folder / "picture.png"
    picture.write_bytes(first_picture(folder))
    model, short = folder / "run" / "policy", ("-s", "generation.max_new_tokens=4")
    answer = run("generate", model, "-i", picture, "-p", "what is this ?", *short)
    assert answer.exit_code == 0, answer.output
    written = run("generate", model, "-o", folder / "answers.jsonl", *config)
    assert written.exit_code == 0, written.output
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt_id"] for row in rows})

    verdict = run("guard", "check", folder / "run" / "guard", "-i", picture, "--prompt", "what is this ?", "--json")
    parsed = json.loads(verdict.stdout)
    assert verdict.exit_code == int(parsed["flagged"])
    ask = ("-p", "what is this ?", "-i", picture)
    looped = run("guard", "regenerate", folder / "run" / "guard", "-m", model, *ask, "--rounds", "1", *short)
    assert looped.exit_code == 0, looped.output
    assert "outcome" in looped.output and "attempt" in looped.output and "reason" in looped.output
    whole = run("guard", "regenerate", folder / "run" / "guard", "-m", model, *ask, "--rounds", "1", *short, "--json")
    parsed = json.loads(whole.stdout)
    assert parsed["rounds"] == max(0, len(parsed["attempts"]) - 1)
    assert {"kind", "action", "reason", "degraded"} <= set(parsed["query_verdict"])
    for attempt in parsed["attempts"]:
        assert attempt["verdict"]["kind"] == "response" and attempt["tokens"] > 0


def test_figures_of_a_trained_guard_show_its_f1(capsys: pytest.CaptureFixture[str]) -> None:
    from safe_rlhf_v.cli import common
    from safe_rlhf_v.stages.start import guard_figures

    head = dict.fromkeys(("f1", "precision", "recall", "fpr", "recall_at_1_fpr", "auprc"), 0.875) | {
        "n": 8,
        "unsafe": 4,
    }
    head |= {"n": 8, "unsafe": 4, "intervals": {}}
    evaluation = {"query": None, "response": head, "severity_kappa": 0.5, "degraded": 1}
    common.show("guard", guard_figures({"steps": 3, "kinds": ["response"], "evaluation": evaluation}))
    shown = capsys.readouterr().out
    assert "response f1" in shown and "0.875" in shown and "severity kappa" in shown and "steps" in shown
    common.show("guard", guard_figures({"steps": 3, "kinds": ["query"]}))  # without an evaluation split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guard", "check", "nowhere", "-p", "what \udcff is"), "the prompt is not UTF-8 text"),
        (("generate", "nowhere", "-i", "https://example.org/a.png", "-p", "a"), "https://example.org/a.png"),
        (
            ("generate", "nowhere", "-i", "https://example.org/a.png", "-p", "a"),
            "nothing is fetched; download it first",
        ),
        (("generate", "nowhere", "-p", "what \udcff is"), "the prompt is not UTF-8 text"),
    ],
)
def test_what_is_no_text_and_no_picture_is_said_before_a_model_is_loaded(
    arguments: tuple[str, ...], message: str
) -> None:
    assert message in error(*arguments)


def first_picture(folder: Path) -> bytes:
    from beavertails_v import load_comparisons

    return load_comparisons(folder / "data", "evaluation")[0].prompt.images[0].encoded()


def test_direct_stage_from_pairs_to_report(folder: Path, tmp_path: Path) -> None:
    """A model that the command wrote is measured, answers, and is what a next one starts from."""
    config = ("--config", folder / "run.yaml", f"output_dir={tmp_path}")
    missing = error("train", "direct", *config, "direct.algorithm=c_dpo")
    assert "holds no finished reward model: run `safe-rlhf-v train reward` first, or set direct.reward_model" in missing
    for name in ("reward", "cost"):
        model = HeadedModel(load_backbone(folder / "base"), {"score": 1})
        model.save_pretrained(tmp_path / f"{name}_model", load_processor(folder / "base"))
    scores = [f"{part}.{x}_model={tmp_path}/{x}_model" for part in ("direct", "policy") for x in ("reward", "cost")]
    for algorithm in ("c_dpo", "sacpo"):
        result = run("train", "direct", *config, *scores, f"direct.algorithm={algorithm}", "--overwrite")
        assert result.exit_code == 0, result.output
        assert ("evaluation helpfulness accuracy" in result.output) == (algorithm == "c_dpo")
    trained = tmp_path / "direct"
    assert {"helpfulness", "safety", "config.json", "done.json", "README.md"} <= {p.name for p in trained.iterdir()}
    other = error("train", "direct", *config, *scores)
    assert "direct.algorithm (sacpo then, dpo now)" in other

    policys = tmp_path / "report.json"
    policys.write_text("of the policy")
    measure = (*config, *scores, f"evaluation.model={trained}", "direct.algorithm=sacpo", "policy.threshold=-1")
    result = run("evaluate", *measure)
    assert result.exit_code == 0, result.output
    own = tmp_path / "evaluation" / "direct"
    assert f"report: {own / 'report.html'}" in result.output.replace("\n", "")
    assert policys.read_text() == "of the policy" and not (tmp_path / "report.html").exists()
    assert (own / "left_out.jsonl").is_file()
    report = json.loads((own / "report.json").read_text())
    found = report["constraint"]
    assert (found["threshold"], found["final_multiplier"], found["algorithm"]) == (-1.0, 4.0, "sacpo")
    assert report["seconds"]["direct"] > 0
    answer = run("generate", trained, "-p", "what is this ?", "-s", "generation.max_new_tokens=4")
    assert answer.exit_code == 0, answer.output
    next_one = (f"model.start={trained}", f"output_dir={tmp_path}/next", "direct.max_steps=1")
    onward = run("train", "direct", *config, *next_one)
    assert onward.exit_code == 0, onward.output


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("dpo", DPO(beta=0.3, axis="safer", allow_contradictory=True)),
        ("kto", KTO(beta=0.3, allow_contradictory=True)),
        ("sacpo", SACPO(beta=0.3, q=0.5, allow_contradictory=True)),
        ("safe_dpo", SafeDPO(beta=0.3)),
        ("bfpo", BFPO(beta=0.3)),
        ("c_dpo", CDPO(beta=0.3, threshold=-2.0)),
        ("mm_dpo", MMDPO(beta=0.3)),
    ],
)
def test_direct_algorithms_are_built_from_their_sections(name: str, algorithm: Any) -> None:
    own = ["direct.dpo.axis=safer", "direct.sacpo.q=0.5", "direct.c_dpo.threshold=-2"]
    chosen = load_settings(None, [f"direct.algorithm={name}", "direct.beta=0.3", "data.keep=[contradictory]", *own])
    assert chosen.direct.made(allow_contradictory=chosen.data.allow_contradictory) == algorithm


def test_killed_stage_goes_on(folder: Path, tmp_path: Path) -> None:
    settings = load_settings(folder / "run.yaml", [f"output_dir={tmp_path}"])

    def dies(where: Path) -> dict[str, Any]:
        (where / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    def ends(where: Path) -> dict[str, Any]:
        return {"found": (where / "checkpoint").read_text()}

    with pytest.raises(KeyboardInterrupt):
        run_stage("reward", settings, ["reward"], dies, start="x")
    assert run_stage("reward", settings, ["reward"], ends, start="x") == {"found": "half"}
    assert run_stage("reward", settings, ["reward"], dies, start="x") == {"found": "half"}  # done: not run again
    with pytest.raises(SettingsError, match=r"start \(x then, y now\)"):
        run_stage("reward", settings, ["reward"], ends, start="y")
    with pytest.raises(FileNotFoundError):  # thrown away
        run_stage("reward", settings, ["reward"], ends, overwrite=True, start="y")


RANK_THAT_OVERWRITES = """
import re
import shutil, sys, time
from pathlib import Path
from safe_rlhf_v.stages.folder import run_stage
from safe_rlhf_v.config import load_settings

delete = shutil.rmtree
shutil.rmtree = lambda folder: (time.sleep(2), delete(folder))  # the main process takes its time
ended = run_stage("reward", load_settings(None, [f"output_dir={sys.argv[1]}"]), ["reward"],
                  lambda folder: {"old": (folder / "old").exists()}, overwrite=True, start="new")
print(ended)
"""


def test_no_rank_looks_before_the_main_one_has_thrown_away(tmp_path: Path) -> None:
    """Another rank would take the old work for done, or refuse its settings."""
    run_stage("reward", load_settings(None, [f"output_dir={tmp_path}"]), ["reward"], lambda _: {"stale": True})
    (tmp_path / "reward" / "old").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    address |= {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_THAT_OVERWRITES, str(tmp_path)],
            env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert ["{'old': False}" in rank.communicate()[0] for rank in ranks] == [True, True]


def test_demonstrations_that_cannot_be_encoded_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would otherwise end the run at whichever step draws them."""
    settings = load_settings(folder / "run.yaml", ["model.max_response_length=12"])
    pairs, encoder = data.comparisons(settings.data, "train"), Encoder(load_processor(folder / "base"))
    found, _ = data.demonstrations(pairs, "more_helpful", encoder, settings.model.max_response_length)
    assert 0 < len(found) < len(pairs)
    assert encoder.responses([text for _, text in found]).ids.shape[1] <= 12
    assert encoder.max_response_length is None
    assert "demonstrations left out" in capsys.readouterr().out


def test_guard_does_not_grade_its_own_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no truth is known the trained models judge, but not the guard whose loop is measured."""
    prompts = [Prompt(text="how ?", category="animal_abuse"), Prompt(text="what ?"), Prompt(text="why ?", benign=True)]
    asked: list[Any] = []
    monkeypatch.setattr(evaluate, "regenerate", lambda policy, guard, rows, *_, **__: asked.append(rows) or rows)
    monkeypatch.setattr(evaluate, "safety_by_round", lambda _, judge, __, more: [judge(prompts[0], "so ."), more])
    base: Any = SimpleNamespace(sampling=Sampling(), encoder=None, batch_size=2)
    flags_all: Any = SimpleNamespace(can_judge=lambda kind: True, judge=lambda *_: [SimpleNamespace(severity=3)])
    scorer: Any = lambda prompts, texts: ([0.0], [-1.0])  # noqa: E731
    benchmark = evaluate.benchmark_of(prompts, scorer, evaluate._severities(flags_all))
    assert benchmark.judge(prompts[:1], ["so ."])[0].unsafe  # elsewhere the guard has its say
    rounds = evaluate._rounds(flags_all, base, benchmark, 5, 0)
    assert rounds == [False, prompts[2:]]
    assert asked == [prompts[:1], prompts[2:]]  # what invites harm and what is harmless, each in a loop of its own


def test_report_warns_of_evaluation_prompts_seen_in_training(folder: Path, tmp_path: Path) -> None:
    """By what the stages were trained on, which the settings of the evaluation need not name."""
    made = load_settings(folder / "run.yaml").data
    prompts = dict(zip(("train", "evaluation"), (pairs.prompts() for pairs in data.both(made)), strict=True))
    settings = load_settings(folder / "run.yaml", [f"output_dir={tmp_path}"])
    world = settings.data.path
    assert leakage_notes(tmp_path, world, prompts["evaluation"]) == []  # nothing was trained here
    run_stage("reward", settings, ["reward"], lambda _: {})
    run_stage("cost", settings, ["cost"], lambda _: {})
    assert leakage_notes(tmp_path, world, prompts["evaluation"]) == []
    elsewhere = load_settings(folder / "run.yaml", [f"output_dir={tmp_path}", "data.path=elsewhere"])
    mixed = [*prompts["evaluation"], *prompts["train"][:2], replace(prompts["train"][2], text="another question")]
    (note,) = leakage_notes(tmp_path, elsewhere.data.path, mixed)
    assert f"3 of {len(mixed)} evaluation prompts" in note and str(folder / "data") in note
    assert "2 stand there word for word with their pictures, 1 shares a picture alone" in note


def test_repo_has_its_own_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(None, ["policy.algorithm=repo", "policy.threshold=auto"])
    assert threshold(settings.policy, tmp_path) == 0.0
    assert not capsys.readouterr().out


@pytest.mark.parametrize("given", ["policy.threshold=-1.5", "policy.threshold_quantile=0.3"])
def test_a_bound_that_repo_does_not_use_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    assert threshold(load_settings(None, ["policy.algorithm=repo", given]).policy, tmp_path) == 0.0
    assert "policy.threshold is not used by repo" in capsys.readouterr().out


def test_scores_of_answers_that_spell_a_special_token(folder: Path, tmp_path: Path) -> None:
    for name in ("reward", "cost"):
        model = HeadedModel(load_backbone(folder / "base"), {"score": 1})
        model.save_pretrained(tmp_path / name, load_processor(folder / "base"))
    settings = load_settings(folder / "run.yaml")
    scoring = Scoring(tmp_path / "reward", tmp_path / "cost", settings.model, settings.generation.batch_size)
    rewards, costs = scoring([Prompt(text="what is this ?")], ["this is <image> </s> it"])
    assert len(rewards) == len(costs) == 1


def test_bookkeeping_may_change_and_other_stages_do_not_matter() -> None:
    def of(*overrides: str) -> dict[str, Any]:
        return identity(load_settings(None, overrides), ["reward"])

    assert of("reward.save_steps=3", "reward.report_to=[tensorboard]") == of()
    assert of("cost.learning_rate=3") == of()
    assert of("reward.learning_rate=3") != of()
    assert of("seed=3") != of()


def test_data_commands(folder: Path, tmp_path: Path) -> None:
    made = run("data", "picture-world", "--out", tmp_path / "world", "--train", "6", "--evaluation", "4", "--seed", "3")
    assert made.exit_code == 0, made.output
    assert "kept 6 rows, left out 0" in run("data", "check", tmp_path / "world", "--strict").output
    assert "4 pairs" in run("data", "info", tmp_path / "world", "--split", "evaluation").output
    assert run("data", "leakage", tmp_path / "world", "--strict").exit_code == 0
    same = run("data", "leakage", tmp_path / "world", "--evaluation", "train", "--strict")
    assert same.exit_code == 1
    assert "training rows to leave out: [0, 1, 2" in same.output


def test_check_reports_faults(folder: Path, tmp_path: Path) -> None:
    row = {"question": "what is this?", "category": "violence_and_physical_harm", "response_1": "a", "response_2": "a"}
    row |= {f"is_response_{k}_safe": "yes" for k in (1, 2)} | {f"response_{k}_harmless_rate": 1 for k in (1, 2)}
    row |= {f"response_{k}_helpful_rate": 1 for k in (1, 2)} | {f"response_{k}_from": "x" for k in (1, 2)}
    row |= {"more_helpful_response_id": 1, "safer_response_id": 1, "image_severity": 0, "image": "none.png"}
    fine = row | {"response_2": "b", "image": "there.png"}
    (tmp_path / "there.png").write_bytes(first_picture(folder))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, fine)))
    result = run("data", "check", tmp_path, "--strict", "--report", tmp_path / "faults.jsonl")
    assert result.exit_code == 1
    assert "left out 1" in result.output
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "sft"], "model.path is not set"),
        (["train", "sft", "model.path=x"], "data.path is not set"),
        (["train", "sft", "--config", "none.yaml"], "none.yaml: no such settings file"),
        (["train", "sft", "sft.learning_rat=1"], "did you mean 'sft.learning_rate'"),
        (["train", "reward", "reward.max_steps=many"], "override 'reward.max_steps=many'"),
        (["data", "check", "nowhere"], "nowhere"),
        (["generate", "model"], "give --prompt for one question"),
        (["generate", "model", "-p", "hi", "-i", "none.png"], "none.png"),
        (["guard", "check", "nowhere", "-p", "hi"], "nowhere has no guard.json"),
        (["guard", "check", "nowhere"], "give --prompt"),
        (["guard", "regenerate", "nowhere", "-m", "x"], "give --prompt"),
        (["guard", "check", "nowhere", "--text", "hi"], "No such option"),
        (["settings", "--search", "xyzzy"], "no setting's name or description holds 'xyzzy'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in error(*arguments)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", "holds no config.json, so it is no model in transformers' format"),
        ("*processor*", "has no processor"),
        ("*token*", "has no processor"),
    ],
)
def test_a_model_folder_that_lacks_files_is_named(folder: Path, tmp_path: Path, gone: str, words: str) -> None:
    shutil.copytree(folder / "base", tmp_path / "half")
    for file in (tmp_path / "half").glob(gone):
        file.unlink()
    message = error("generate", tmp_path / "half", "-p", "what is this ?")
    assert words in message and "half" in message


def test_other_mistakes_with_models_and_settings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert "no/model: no such folder, and not to be had from the hub" in error("generate", "no/model", "-p", "hi")
    (tmp_path / "text.yaml").write_bytes(b"\xff\xfe\x00")
    assert "text.yaml: not a text file in UTF-8" in error("train", "sft", "-c", "text.yaml")
    (tmp_path / "tab.yaml").write_text("model:\n\tpath: y\n")
    assert "tab.yaml: " in (found := error("train", "sft", "-c", "tab.yaml")) and "line 2" in found
    config = ("--config", folder / "run.yaml", f"output_dir={tmp_path / 'run'}")
    assert "reward.lr_scheduler_type = 'cosin'" in error("train", "reward", *config, "reward.lr_scheduler_type=cosin")
    assert "reward.optim = 'adam'" in error("train", "reward", *config, "reward.optim=adam")
    assert "policy.lr_scheduler_type" in error("settings", "policy.lr_scheduler_type=cosin")
    (tmp_path / "file").touch()
    refused = error("train", "reward", *config[:2], f"output_dir={tmp_path / 'file' / 'x'}")
    assert "file/x/reward: not a directory; choose another output_dir" in refused
    (tmp_path / "answer.txt").touch()
    assert "text.png" in error("generate", folder / "base", "-p", "hi", "-i", "text.png")


def test_a_benign_set_with_harm_in_it_is_a_mistake_of_the_user(folder: Path, tmp_path: Path) -> None:
    config = ("--config", folder / "run.yaml", f"output_dir={tmp_path}", f"guard.benign={folder / 'data'}")
    assert "leave it out of the benign set" in error("train", "guard", *config)


def test_control_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safe_rlhf_v.config.load", stopped)
    result = run("settings")
    assert result.exit_code == 130 and "stopped" in result.output and "Traceback" not in result.output


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFE_RLHF_V_DEBUG", "")  # what --debug sets is undone after the test
    result = run("--debug", "train", "sft")
    assert result.exit_code == 2 and "Traceback" in result.output and "model.path is not set" in result.output


def test_bugs_keep_their_traceback_and_look_like_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ValueError("not for users")

    monkeypatch.setattr("safe_rlhf_v.config.load", bug)
    result = run("settings")
    assert result.exit_code == 70
    assert "Traceback" in result.output and "ValueError: not for users" in result.output
    assert "fault of safe-rlhf-v" in result.output


def test_settings_are_listed_and_saved(tmp_path: Path) -> None:
    result = run("settings", "--search", "generation.")
    assert re.search(r"generation.temperature +│ 1\.0 ", result.output)
    assert re.search(r"generation.top_k +│ 0 ", result.output)
    result = run("settings", "--search", "policy.beta", "policy.beta=0.3", "--save", tmp_path / "full.yaml")
    assert "0.3 (default" in result.output
    assert load_settings(tmp_path / "full.yaml").policy.beta == 0.3


@pytest.mark.parametrize(
    "command", ["train policy", "train direct", "train sft", "data check", "guard check", "generate", "evaluate"]
)
def test_help_teaches_by_example(command: str) -> None:
    assert f"Example: safe-rlhf-v {command}" in " ".join(run(*command.split(), "--help").output.split())


def test_help_names_what_a_first_run_leaves_behind() -> None:
    """The examples are of the folder that quickstart writes, and its --config is not one of defaults."""
    for command in ("guard check", "guard regenerate", "generate"):
        shown = run(*command.split(), "--help").output
        assert "runs/quickstart/" in shown and "runs/demo" not in shown
    assert "every setting has its default" not in " ".join(run("quickstart", "--help").output.split())
    root = run("--help").output
    assert root.index("quickstart  ") < root.index("evaluate    Compare")
    assert "model.path" in run("train", "--help").output


@pytest.mark.parametrize("command", ["guard check", "guard regenerate", "generate"])
def test_a_question_is_called_prompt_everywhere(command: str) -> None:
    shown = run(*command.split(), "--help").output
    assert "--prompt" in shown and "--text" not in shown


def test_help_does_not_wait_for_torch() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, safe_rlhf_v.cli; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ([], None),
        (["policy.measure.kind=cvar", "policy.measure.alpha=0.75"], (-0.5, 4.0)),  # the worst of four
        (["policy.measure.kind=high_confidence", "policy.measure.kappa=1"], (-0.5, 2.5276)),  # .25 + sqrt(20.75 / 4)
        (["policy.algorithm=repo", "policy.repo.slack=0.2"], (0.2, 1.0)),
        (["policy.algorithm=repo", "policy.repo.margin=1"], (0.0, 1.5)),  # 0, 0, 1, 5
        (  # prompts of -2, 0 and of -1, 4: means + 1 are 0 and 2.5
            [
                "policy.algorithm=repo",
                "policy.repo.margin=1",
                "policy.repo.form=per_prompt",
                "policy.num_generations=2",
            ],
            (0.0, 1.25),
        ),
    ],
)
def test_the_report_says_what_training_bounded_where_it_is_not_the_mean(
    changes: list[str], want: tuple[float, float] | None
) -> None:
    found = bounded_instead(load_settings(None, changes).policy, -0.5, [-2.0, -1.0, 0.0, 4.0], ["a", "b", "a", "b"])
    assert (found and (found["bound"], found["value"])) == (want and pytest.approx(want, abs=1e-4))


def test_data_check_reads_every_split_and_writes_one_report(folder: Path, tmp_path: Path) -> None:
    """A split without a usable row is an error at the end; the other splits and the report file come first."""
    columns = {"response_1": "a", "response_2": "b", "more_helpful_response_id": 1, "safer_response_id": 1}
    row = {"question": "q", "images": [], "response_1_harmless_rate": 1, "response_2_harmless_rate": 0} | columns
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n\n[]\n")
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(row | {"images": ["https://example.org/a.png"]}))
    result = run("data", "check", tmp_path, "--report", tmp_path / "faults.jsonl")
    assert result.exit_code == 2 and "[train]: kept 1 rows, left out 1" in result.output
    faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(f["split"], f["row"]) for f in faults] == [("train", 3), ("evaluation", 1)]
    assert run("data", "check", tmp_path, "--split", "train").exit_code == 0
