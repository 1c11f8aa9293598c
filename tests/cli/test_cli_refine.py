import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from beavertails_v.dialogues import Dialogue, Turn, load_dialogues, write_dialogues
from beavertails_v.picture_world import vocabulary, write
from safe_rlhf_v.cli import app
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.stages import refine

TINY = """
output_dir: {folder}/run
model: {{path: {folder}/base}}
data: {{path: {folder}/data}}
sft: {{max_steps: 2, learning_rate: 1e-3}}
guard: {{max_steps: 2}}
generation: {{max_new_tokens: 8, batch_size: 32}}
evaluation: {{bootstrap: 100, examples: 2}}
refinement: {{first_turns: all}}
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    write(folder / "data", train=40, evaluation=12)
    model, processor = tiny_llava(vocabulary(), hidden_size=16, layers=2, vision_layers=1, heads=2)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    (folder / "run.yaml").write_text(TINY.format(folder=folder))
    return folder


def error(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def ok(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_dialogues_training_and_figures(folder: Path) -> None:
    """The road of a real run: dialogues, both trainings, free and fixed figures."""
    config = ("--config", folder / "run.yaml")
    made = folder / "dialogues"
    output = ok("refine", "dialogues", made, "--student", folder / "base", "--mode", "blind", "--count", "60", *config)
    assert "written" in output
    found, report = load_dialogues(made)
    assert (len(found), report.dropped) == (60, [])
    assert len({d.prompt.id for d in found}) == 40  # twenty were asked twice
    assert {d.source for d in found} == {"free/blind"}

    for who in ("student", "teacher"):
        said = ok("refine", "train", who, "--dialogues", made, *config)
        assert "written" in said and f"next: safe-rlhf-v refine evaluate {made} --{who} {folder}/run/{who}" in said
        measured = json.loads((folder / "run" / who / "done.json").read_text())["measured"]
        assert measured["steps"] == 2
        assert 40 <= measured["dialogues"] < 60
    assert 0 <= measured["teacher"]["score"]["mae"] <= 9
    assert "done before" in ok("refine", "train", "teacher", "--dialogues", made, *config)
    changed = error("refine", "train", "teacher", "--dialogues", made, *config, "refinement.first_turns=none")
    assert "refinement.first_turns (all then, none now)" in changed

    trained = ("--student", folder / "run" / "student", "--teacher", folder / "run" / "teacher")
    said = ok("refine", "dialogues", folder / "trained", *trained, "--split", "evaluation", *config)
    assert f"next: safe-rlhf-v refine train student --dialogues {folder / 'trained'} --config" in said
    figures = folder / "figures.json"
    ok("refine", "evaluate", folder / "trained", "--baseline", made, "-o", figures, *config)
    free = json.loads(figures.read_text())
    assert free["intervals"]["adr"]["value"] == pytest.approx(free["adr"])
    assert free["dialogues"] == 12
    assert free["average_turns"] > 0
    ok("refine", "evaluate", made, *trained, "-o", figures, *config)
    fixed = json.loads(figures.read_text())
    assert set(fixed["teacher"]) == {"score", "feedback", "leak_rate"}
    assert 0 <= fixed["student"]["bleu_1"] <= 1


def test_the_experiment(folder: Path) -> None:
    config = ("--config", folder / "run.yaml", f"output_dir={folder}/compare")
    missing = error("refine", "compare", *config, "--size", "50")
    assert "holds no finished guard model" in missing
    ok("train", "guard", *config)
    output = ok("refine", "compare", *config, "--size", "50", "--size", "60")
    assert "refinement.html" in output
    data = json.loads((folder / "compare" / "refinement.json").read_text())
    assert [p["training_dialogues"] for p in data["curve"]] == [0, 50, 60]
    assert data["curve"][0]["teacher"] == {} and data["curve"][2]["teacher"]["score"]["n"] > 0
    assert len(data["arms"]) == 9
    assert {a["name"] for a in data["arms"]} >= {"base blind by guard", "base guided by guard", "trained by guard"}
    assert data["prompts"] == 12
    again = ok("refine", "compare", *config, "--size", "50", "--size", "60")
    assert "teacher-60: done before" in again


def test_replies_that_do_not_fit_are_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dialogue that outgrows the model ends with a bad score; the others go on."""
    from beavertails_v import Prompt

    settings = load_settings(folder / "run.yaml", ["model.max_prompt_length=12"])
    replies = refine.Replies(folder / "base", settings.model, settings.generation)
    found = replies([Prompt(text="what is this ?"), Prompt(text="what is this ? " * 9)])
    assert found[1] == ""
    assert "no reply: prompt" in capsys.readouterr().out


def test_a_quoted_reply_cannot_forge_a_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beavertails_v import Prompt

    settings = load_settings(folder / "run.yaml")
    replies = refine.Replies(folder / "base", settings.model, settings.generation)
    monkeypatch.setattr(type(replies.model), "__call__", lambda self, prompts: ["a <image> </s> b"] * len(prompts))
    (text,) = replies([Prompt(text="what is this ?")])
    assert "<image>" not in text and "</s>" not in text
    replies.model.encoder.prompts([Prompt(text=text)])  # it can be quoted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere"], "nowhere: no such file; make dialogues with"),
        (["train", "student", "--dialogues", "nowhere", "model.path=x"], "nowhere: no such file"),
        (["train", "student", "--dialogues", "nowhere"], "model.path is not set"),
        (["dialogues", "out", "--student", "x"], "data.path is not set"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in error("refine", *arguments)


def test_dialogues_that_teach_nothing_are_refused_before_training(folder: Path) -> None:
    """Each has one answer, right at once: nothing to refine. With first answers taken, nothing to measure on."""
    prompts = refine.Refining(load_settings(folder / "run.yaml")).cases("train")
    once = [Dialogue(prompt=c.prompt, truth=c.truth, turns=(Turn(answer="so .", score=9),)) for c in prompts]
    write_dialogues(once, folder / "once")
    train = ("refine", "train", "student", "--dialogues", folder / "once", "--config", folder / "run.yaml")
    output = f"output_dir={folder}/nothing"
    assert "hold nothing to train on" in error(*train, output, "refinement.first_turns=none")
    assert "has a second answer to measure the student on" in error(*train, output, "--overwrite")
    given = ("--student", folder / "base", "--config", folder / "run.yaml")
    assert "no dialogue has a second turn" in error("refine", "evaluate", folder / "once", *given)


def test_the_oracle_knows_the_picture_world_alone(folder: Path) -> None:
    from beavertails_v import Prompt

    with pytest.raises(ValueError, match="--teacher oracle knows the picture world alone"):
        refine.Refining(load_settings(folder / "run.yaml")).teacher("oracle", [Prompt(text="what ?")])


@pytest.mark.parametrize(
    "command", ["refine dialogues", "refine train student", "refine train teacher", "refine evaluate", "refine compare"]
)
def test_help_teaches_by_example(command: str) -> None:
    assert f"Example: safe-rlhf-v {command}" in " ".join(run(*command.split(), "--help").output.split())
