"""Data of other column names, from the command line: each command reads it by the map, and none without."""

import json
from pathlib import Path

import pytest
from commands import error, run

from beavertails_v.picture_world import vocabulary
from safe_rlhf_v.demo.tiny import tiny_llava

MAP = """
name: mine
kind: comparisons
columns: {question: ask, response: [a, b], safe: [a_ok, b_ok], more_helpful: best, safer: safest}
ids: [first, second]
safe_words: {fine: true, bad: false}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pairs a split: the first response is more helpful and unsafe, the second is safer."""
    for split in ("train", "evaluation"):
        row = {"images": [], "a": "a knife .", "b": "a cat .", "a_ok": "bad", "b_ok": "fine"}
        rows = [row | {"ask": f"what is this ? {split} {i}", "best": "first", "safest": "second"} for i in range(6)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    (tmp_path / "map.yaml").write_text(MAP)
    return tmp_path


def ok(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_data_commands_read_by_the_map(data: Path) -> None:
    columns = ("--columns", data / "map.yaml")
    assert ok("data", "check", data, *columns).count("kept 6 rows, left out 0") == 2  # both splits
    assert "safe responses: 6 of 12" in ok("data", "info", data, *columns)
    assert "0" in ok("data", "leakage", data, *columns)


@pytest.mark.parametrize("command", ["check", "info", "leakage"])
def test_data_commands_without_the_map_name_the_columns(data: Path, command: str) -> None:
    assert "ask" in error("data", command, data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MAP.replace("ask", "asked"), "the column map 'mine' needs asked"),
        (MAP.replace("best", "a_ok"), "'a_ok' stands twice under 'columns'"),
        (MAP + "ids: [second, first]\n", "the key 'ids' stands twice"),
        (MAP.replace("false", "perhaps"), "safe_words"),
    ],
)
@pytest.mark.parametrize("command", ["check", "info"])
def test_a_map_that_does_not_fit_is_named(data: Path, command: str, text: str, words: str) -> None:
    (data / "map.yaml").write_text(text)
    assert words in error("data", command, data, "--columns", data / "map.yaml")


def test_a_stage_reads_by_the_map(data: Path) -> None:
    model, processor = tiny_llava(vocabulary(), hidden_size=16, layers=2, vision_layers=1, heads=2)
    model.save_pretrained(data / "base")
    processor.save_pretrained(data / "base")
    train = ("train", "cost", f"model.path={data / 'base'}", f"data.path={data}", f"output_dir={data / 'run'}")
    assert "ask" in error(*train, "cost.max_steps=1")
    ok(*train, "cost.max_steps=1", f"data.columns={data / 'map.yaml'}")
    lines = (data / "run" / "cost" / "evaluation_scores.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(x["more_helpful"], x["safer"], x["unsafe"]) for x in found] == [(0, 1, [True, False])] * 6
