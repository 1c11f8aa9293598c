"""A stage is a row of one table; what its work leaves is written in one place, by the main process alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from safe_rlhf_v.cli import train
from safe_rlhf_v.config import Settings, load_settings
from safe_rlhf_v.planning import stages as memory
from safe_rlhf_v.stages.card import Card
from safe_rlhf_v.stages.folder import StageResult, record
from safe_rlhf_v.stages.stage import Forward, Plan, Stage
from safe_rlhf_v.stages.stages import STAGES

CARD = Card(kind="copy", purpose="Copies its start.", limits="It learns nothing.")


def plan(settings: Settings) -> Plan:
    """A stage of two parts, as the recipe in docs/design.md has it."""
    start = settings.model.path

    def work(folder: Path) -> StageResult:
        (folder / "first").mkdir()
        (folder / "first" / "metrics.json").write_text('{"steps": 1}')
        return StageResult(
            measured={"steps": 2, "hidden": 0.5}, base=start, shown={"steps": 2}, parts={"first": "zero"}
        )

    return Plan(work=work, inputs={"start": start})


COPY = Stage(name="copy", sections=("sft",), plan=plan, card=CARD, memory=Forward(loss="logps"))


def test_a_stage_leaves_its_settings_its_card_and_its_figures(tmp_path: Path) -> None:
    settings = load_settings(None, [f"output_dir={tmp_path}", "model.path=somebody/model"])
    assert COPY.run(settings) == {"steps": 2, "hidden": 0.5}
    folder = tmp_path / "copy"
    assert load_settings(folder / "settings.yaml") == load_settings(folder / "first" / "settings.yaml") == settings
    card, part = ((folder / name / "README.md").read_text() for name in (".", "first"))
    assert "Copies its start." in card and "- Base: `somebody/model`" in card
    assert "| steps | 2 |" in card and "hidden" not in card
    assert "- Base: `zero`" in part and "| steps | 1 |" in part
    assert json.loads((folder / "done.json").read_text())["measured"] == {"steps": 2, "hidden": 0.5}
    assert json.loads((folder / "stage.json").read_text())["start"] == "somebody/model"
    assert COPY.run(settings) == {"steps": 2, "hidden": 0.5}  # done: a second `work` would fail on the folder `first`


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = StageResult(measured={"steps": 2}, base="zero")
    monkeypatch.setenv("RANK", "1")
    assert record(result, tmp_path, CARD, Settings()) == {"steps": 2} and not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    record(result, tmp_path, CARD, Settings())
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml", "README.md"}


def test_table_sections_and_commands_agree() -> None:
    command: Any = typer.main.get_command(train.app)
    assert set(command.commands) == {*STAGES, "start"}
    for name, stage in STAGES.items():
        assert stage.name == name == stage.card.kind
        assert set(stage.sections) <= set(Settings.model_fields)
    assert set(memory.SUPERVISED) == set(STAGES) - {"policy"}
