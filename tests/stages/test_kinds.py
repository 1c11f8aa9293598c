"""A folder is taken for what it holds, and a report goes where no other model's stands."""

import json
from pathlib import Path

import pytest
from commands import error

from safe_rlhf_v.stages.evaluate import report_folder
from safe_rlhf_v.stages.models import trained
from safe_rlhf_v.vlm.kind import kind_of, require_answering
from safe_rlhf_v.vlm.source import ModelError

HEADS = {"heads": {"score": 1}, "bias": False}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """guard, reward and cost by headed.json; carded, a cost model by its card alone; unsaid; policy."""
    for name in ("guard", "reward", "cost", "carded", "unsaid", "policy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if name != "policy":
            kind = {"kind": name} if name in ("reward", "cost") else {}
            (tmp_path / name / "headed.json").write_text(json.dumps(HEADS | kind))
    (tmp_path / "guard" / "guard.json").write_text("{}")
    (tmp_path / "carded" / "README.md").write_text("---\ntags: [safe-rlhf-v, cost]\n---\n# mine: cost\n")
    return tmp_path


def test_a_folder_says_what_it_holds(folders: Path) -> None:
    found = {folder.name: kind_of(folder) for folder in folders.iterdir()}
    own = {"guard": "guard", "reward": "reward", "cost": "cost"}
    assert found == own | {"carded": "cost", "unsaid": "heads", "policy": "answers"}
    assert kind_of("owner/name") == "answers"
    (folders / "cost" / "headed.json").write_text("[")  # named by whoever loads it
    assert kind_of(folders / "cost") == "heads"


@pytest.mark.parametrize(
    ("setting", "folder", "words"),
    [
        (
            "policy.cost_model",
            "reward",
            "holds a reward model, not a cost model; give the folder that `train cost` wrote",
        ),
        ("policy.reward_model", "cost", "holds a cost model, not a reward model"),
        ("policy.reward_model", "carded", "holds a cost model, not a reward model"),
        ("policy.cost_model", "guard", "holds a guard, not a cost model"),
        ("policy.cost_model", "policy", "has no headed.json, so it is no cost model or has lost its head"),
        ("policy.reward_model", "gone", "no such folder; give the folder that `train reward` wrote"),
        ("direct.cost_model", "reward", "holds a reward model, not a cost model"),
        ("direct.reward_model", "guard", "holds a guard, not a reward model"),
        ("iterative.cost_model", "reward", "holds a reward model, not a cost model"),
        ("iterative.reward_model", "cost", "holds a cost model, not a reward model"),
    ],
)
def test_a_scorer_of_another_kind_is_refused_by_setting_and_folder(
    folders: Path, setting: str, folder: str, words: str
) -> None:
    """Before data or weights are looked at: neither is there."""
    stage = setting.partition(".")[0]
    given = {f"{stage}.reward_model": "reward", f"{stage}.cost_model": "cost", setting: folder}
    more = [f"{name}={folders / value}" for name, value in given.items()]
    more += ["direct.algorithm=c_dpo", f"model.path={folders / 'policy'}", f"output_dir={folders / 'run'}"]
    message = error("train", stage, *more)
    assert f"{setting} = {folders / folder}" in message and words in message


@pytest.mark.parametrize("setting", ["model.path", "model.start", "evaluation.model", "evaluation.base"])
def test_what_scores_is_no_model_that_answers(folders: Path, setting: str) -> None:
    usual = [f"model.path={folders / 'policy'}", f"evaluation.model={folders / 'policy'}"]
    scorers = [f"policy.{kind}_model={folders / kind}" for kind in ("reward", "cost")]
    given = (*usual, *scorers, f"{setting}={folders / 'cost'}", f"output_dir={folders / 'run'}")
    message = error("evaluate", *given)
    assert f"{setting} = {folders / 'cost'} holds a cost model, which scores answers and gives none" in message


def test_scorers_that_do_not_say_what_they_are_pass(folders: Path) -> None:
    assert trained("", "cost", str(folders / "unsaid"), "policy.cost_model")
    with pytest.raises(ModelError, match="holds a model with heads"):
        require_answering(folders / "unsaid")


def test_each_judged_model_has_a_report_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run/policy", "run/direct/safety", "a/policy", "b/policy", "c/a/policy"):
        Path(name).mkdir(parents=True)
    run = Path("run")
    assert report_folder("run/policy", run) == (run, run / "evaluation" / "left_out.jsonl")
    assert report_folder(tmp_path / "run" / "policy", run)[0] == run
    assert report_folder("run/direct", run)[0] == run / "evaluation" / "direct"
    assert report_folder("run/direct/safety", run)[0] == run / "evaluation" / "direct--safety"
    assert report_folder("owner/name", run)[0] == run / "evaluation" / "owner--name"
    elsewhere = [report_folder(name, run)[0] for name in ("a/policy", "b/policy", "c/a/policy")]
    assert len(set(elsewhere)) == 3
    assert all(folder.parent == run / "evaluation" and "policy" in folder.name for folder in elsewhere)
