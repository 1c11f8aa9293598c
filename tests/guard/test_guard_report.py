"""Guards side by side on a file of one's own: a page, a JSON, and every row that was not judged by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from guard.classifier import Guard
from guard.page import short_names
from guard.report import GuardNameError, guard_names
from tests.beavertails_v.data_files import png, write_jsonl
from tests.commands import error, run

MAP = """
name: mine
kind: responses
columns: {question: ask, images: photo, response: [reply], safe: [verdict]}
safe_words: {"ok": true, "bad": false}
"""


@pytest.fixture(scope="module")
def saved(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "guard"
    guard.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten answers; the picture of line 4 is missing, and the answer of line 7 is longer than the model reads."""
    folder = tmp_path_factory.mktemp("own")
    rows: list[dict[str, Any]] = []
    for k in range(10):
        (folder / f"{k}.png").write_bytes(png(40 * k))
        verdict, reply = ("ok", "I cannot help.") if k % 2 else ("bad", "first take the key, then turn it.")
        rows.append({"ask": f"what is in picture {k}?", "photo": f"{k}.png", "reply": reply, "verdict": verdict})
    (folder / "3.png").unlink()
    rows[6]["reply"] = "then turn it " * 1500
    (folder / "mine.yaml").write_text(MAP)
    return write_jsonl(folder / "mine.jsonl", rows), folder / "mine.yaml"


@pytest.fixture(scope="module")
def measured(saved: Path, base: Path, own: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured")
    guards = f"{saved},generative:{base}"
    run("guard", "evaluate", "--guards", guards, "--data", own[0], "--columns", own[1], "--out", out)
    return out


def test_two_guards_on_an_own_file(measured: Path, saved: Path, base: Path) -> None:
    report = json.loads((measured / "evaluation.json").read_text())
    assert list(report["guards"]) == [str(saved), f"generative:{base}"]
    assert report["data"]["responses"] == 9
    for found in report["guards"].values():
        assert found["response"]["n"] == 9 and found["response"]["unsafe"] == 5
        assert found["query"] is None and found["unknown_queries"] == 9  # the file does not label its questions
        assert found["response"]["intervals"]["f1"]["n"] <= 9


def test_what_was_not_judged_stands_by_file_and_row(measured: Path, saved: Path) -> None:
    report = json.loads((measured / "evaluation.json").read_text())
    (left,) = report["data"]["left_out"]
    assert left["row"] == 4 and left["file"].endswith("mine.jsonl")
    for found in report["guards"].values():
        (row,) = found["degraded_rows"]
        assert found["degraded"] == 1 and row["row"] == 7 and row["file"].endswith("mine.jsonl")
        assert "tokens, more than" in row["reason"]


def test_the_page_shows_both_and_loads_nothing(measured: Path) -> None:
    page = (measured / "report.html").read_text(encoding="utf-8")
    assert "generative: " in page and "mine.jsonl row 4" in page and "mine.jsonl row 7" in page
    assert not re.search(r"(src|href)=\"https?:", page) and "<script" not in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S).lower().split()


def test_names(saved: Path, base: Path) -> None:
    assert guard_names([f"{saved}, generative:{base}"]) == [str(saved), f"generative:{base}"]
    with pytest.raises(GuardNameError, match="twice"):
        guard_names([f"{saved},{saved}"])
    assert short_names(["a/guard", "b/other", "generative:c/guard"]) == ["guard", "other", "generative: guard"]
    assert short_names(["a/guard", "b/guard"]) == ["a/guard", "b/guard"]


def test_what_is_no_guard_is_said_before_anything_is_read(base: Path, saved: Path) -> None:
    assert f"generative:{base}" in error("guard", "evaluate", "--guards", base, "--data", "nowhere")
    assert "a guard, which judges" in error("guard", "evaluate", "--guards", f"generative:{saved}", "--data", "nowhere")
