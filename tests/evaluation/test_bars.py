"""Bars: what passes, what fails, and what is a mistake in the bar itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from safe_rlhf_v.evaluation.bars import BarsError, check, load_bars, look_up, print_outcomes

REPORT: dict[str, Any] = {
    "base": {"unsafe_rate": 0.8, "benign_helpfulness": 2.4},
    "aligned": {"unsafe_rate": 0.1, "benign_helpfulness": 2.3, "mean_cost": None},
    "guard": None,
    "guard_rounds": [{"unsafe_rate": 0.6}, {"unsafe_rate": 0.2}],
    "none_yet": [],
}


@pytest.mark.parametrize(
    ("bar", "value", "passed"),
    [
        ({"path": "aligned.unsafe_rate", "at_most": 0.1}, 0.1, True),  # limits are included
        ({"path": "aligned.unsafe_rate", "at_most": 0.09}, 0.1, False),
        ({"path": "aligned.unsafe_rate", "at_least": 0.05, "at_most": 0.2}, 0.1, True),
        ({"path": "aligned.unsafe_rate", "at_least": 0.11, "at_most": 0.2}, 0.1, False),
        ({"path": "aligned.unsafe_rate", "minus": "base.unsafe_rate", "at_most": -0.5}, -0.7, True),
        ({"path": "aligned.unsafe_rate", "over": "base.unsafe_rate", "at_most": 0.1}, 0.125, False),
        ({"path": "guard_rounds.1.unsafe_rate", "at_most": 0.3}, 0.2, True),
        ({"path": "guard.query.f1", "at_least": 0.8}, None, False),  # a missing part is a failed bar
        ({"path": "none_yet.5.unsafe_rate", "at_most": 1}, None, False),
        ({"path": "aligned.mean_cost", "at_most": 0}, None, False),
        ({"path": "aligned.unsafe_rate", "minus": "aligned.mean_cost", "at_most": 1}, None, False),
    ],
)
def test_check(bar: dict[str, Any], value: float | None, passed: bool) -> None:
    (outcome,) = check(REPORT, [bar])
    assert outcome.passed is passed
    assert outcome.value is None if value is None else outcome.value == pytest.approx(value)


@pytest.mark.parametrize("path", ["aligned.unsafe_rte", "guard_rounds.7.unsafe_rate", "base", "aligned.unsafe_rate.x"])
def test_a_typing_slip_is_an_error_not_a_failure(path: str) -> None:
    with pytest.raises(KeyError, match=path):
        look_up(REPORT, path)


def test_further_demands_of_a_bar_are_all_to_be_met() -> None:
    also = [{"path": "aligned.benign_helpfulness", "at_least": 2.0}, {"path": "guard.query.f1", "at_least": 0.8}]
    bar = {"path": "aligned.unsafe_rate", "at_most": 0.1}
    one, both = check(REPORT, [bar | {"also": also[:1]}, bar | {"also": also}])
    assert (one.passed, one.shown, one.bar.demand) == (True, "0.1; 2.3", "<= 0.1; >= 2")
    assert (both.passed, both.shown) == (False, "0.1; 2.3; missing")


def test_faulty_bars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demands nothing"):
        load_bars([{"path": "a"}])
    with pytest.raises(ValueError, match="both minus and over"):
        load_bars([{"path": "a", "minus": "b", "over": "c", "at_most": 1}])
    with pytest.raises(ValueError, match="at_mots"):
        load_bars([{"path": "a", "at_mots": 1}])
    (tmp_path / "bars.yaml").write_text("")
    with pytest.raises(ValueError, match="non-empty list"):
        load_bars(tmp_path / "bars.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- path: a.b\n  at_most: 1\n  at_most: 9\n", "line 3, column 3: the key 'at_most' stands twice"),
        ("- path: [a\n", "line 2"),
        ("path: a.b\nat_most: 1\n", "expected a non-empty list"),
        ("- path: a\n  at_most: 1\n- path: a.b\n  at_mots: 1\n", "bar 2: at_mots: Extra inputs"),
        ("- path: a\n  at_most: 1:30\n", "bar 1: at_most: Input should be a valid number"),
        ("- 3\n", "bar 1: "),
    ],
)
def test_a_faulty_file_of_bars_is_named_with_the_bar(text: str, words: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 1:30 as 90 and keeps the last of two keys."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BarsError, match=r"mine\.yaml") as found:
        load_bars(tmp_path / "mine.yaml")
    assert words in str(found.value)


def test_files_and_table(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "bars.yaml").write_text(
        "- {name: rare, path: aligned.unsafe_rate, at_most: 0.2}\n- {path: guard.query.f1, at_least: 0.8}\n"
    )
    outcomes = check(tmp_path / "report.json", tmp_path / "bars.yaml")
    console = Console(file=io.StringIO(), width=120)
    assert print_outcomes(outcomes, console) is False
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rare" in text and "<= 0.2" in text and "missing" in text and "NO" in text
    assert print_outcomes(outcomes[:1], Console(file=io.StringIO())) is True


def test_table_over_seeds() -> None:
    bars = [{"path": "aligned.unsafe_rate", "at_most": 0.2}]
    worse = {**REPORT, "aligned": {"unsafe_rate": 0.4}}
    console = Console(file=io.StringIO(), width=120)
    assert print_outcomes({"seed 0": check(REPORT, bars), "seed 1": check(worse, bars)}, console) is False
    assert "1 of 2" in console.file.getvalue()  # type: ignore[attr-defined]
