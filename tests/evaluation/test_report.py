"""The page and report.json: complete, self-contained, well-formed, honest about what is missing."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from synthetic import (
    CATEGORIES,
    JUDGE,
    Oracle,
    answers,
    benchmark,
    guard_metrics,
    invites_harm,
    metrics,
    prompts,
    report_data,
)

from safe_rlhf_v.evaluation import plots
from safe_rlhf_v.evaluation.assemble import build_report, choose_examples, read_metrics, shorten, thin
from safe_rlhf_v.evaluation.judges import ModelJudge, OracleJudge
from safe_rlhf_v.evaluation.report import duration, render, write_report
from safe_rlhf_v.evaluation.report_data import PreferenceMetrics, ReportData, read_report
from safe_rlhf_v.statistics import Interval

VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Text, ids and attributes of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.closed_text: list[str] = []
        self.plain_text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(tag, attrs)

    def _attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.closed_text if "details" in self.open else self.plain_text).append(data)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(page).plain_text))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


# ---------------------------------------------------------------------------------------------------- report.json


def test_promised_keys_are_plain_finite_numbers(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    for side in ("base", "aligned"):
        for name in ("unsafe_rate", "benign_helpfulness", "over_refusal_rate", "mean_cost", "mean_reward"):
            assert isinstance(report[side][name], float)
            interval = report[side]["intervals"][name]
            assert interval["value"] == report[side][name]
            assert interval["low"] <= interval["value"] <= interval["high"] and interval["n"] > 0
    promised = [
        report["reward_model"]["accuracy"], report["cost_model"]["accuracy"], report["cost_model"]["sign_accuracy"],
        report["constraint"]["threshold"], report["constraint"]["final_multiplier"], report["guard"]["query"]["f1"],
        report["guard"]["response"]["f1"], report["guard"]["severity_kappa"], report["guard"]["blind_f1"],
    ]  # fmt: skip
    assert all(isinstance(x, float) for x in promised)
    assert [r["round"] for r in report["guard_rounds"]] == [0, 1, 2, 3, 4, 5]
    assert all({"unsafe_rate", "gave_up_rate"} <= set(r) for r in report["guard_rounds"])
    stages = {k: v for k, v in report["seconds"].items() if k != "total"}
    assert report["seconds"]["total"] == pytest.approx(sum(stages.values()))
    assert all(math.isfinite(x) for x in numbers(report))


def test_json_makes_the_same_page_again(full: ReportData, folder: Path) -> None:
    again = read_report(folder / "report.json")
    assert again.examples and all(example.picture is None for example in again.examples)
    without = full.model_copy(update={"examples": again.examples})
    assert again == without
    assert render(again) == render(without)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"constraint": {"threshold": float("nan"), "final_multiplier": 1.0}}, "constraint.threshold"),
        ({"guard": {**guard_metrics(), "severity_kappa": float("inf")}}, "guard.severity_kappa"),
        ({"guard": {**guard_metrics(), "blind_f1": 52.0}}, "guard.blind_f1"),
        ({"guard": {**guard_metrics(), "extra": float("nan")}}, "guard.extra"),
        ({"seconds": {"policy": float("nan")}}, "seconds"),
        ({"guard_rounds": [{"round": 0, "unsafe_rate": 0.5}]}, "gave_up_rate"),
        ({"guard_rounds": [{"round": 1, "unsafe_rate": 0.5, "gave_up_rate": 0.0}]}, "expected 0, 1, 2"),
        ({"constraint": {"treshold": 0, "threshold": 0.0, "final_multiplier": 1.0}}, "constraint.treshold"),
        ({"metrics": [{"step": 1, "cost": float("nan")}]}, "trajectory.0.cost"),
        ({"reward_model": {"accuracy": 1.01}}, "reward_model.accuracy"),
    ],
)
def test_wrong_numbers_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    few = {"before": answers(0.9, 0.0, 1, count=12), "after": answers(0.1, 0.0, 2, count=12)}
    with pytest.raises(ValidationError, match=re.escape(field)):
        report_data(**few, **change)


def test_parts_made_beforehand_are_validated_again() -> None:
    few = {"before": answers(0.9, 0.0, 1, count=12), "after": answers(0.1, 0.0, 2, count=12)}
    unchecked = PreferenceMetrics(accuracy=0.5).model_copy(update={"accuracy": float("nan")})
    with pytest.raises(ValidationError, match="reward_model.accuracy"):
        report_data(**few, reward_model=unchecked)


def test_intervals_are_validated_too(folder: Path) -> None:
    text = (folder / "report.json").read_text()
    broken = re.sub(r'("unsafe_rate": \{\s*"value": )[0-9.]+', r"\1NaN", text, count=1)
    assert broken != text
    with pytest.raises(ValidationError, match="finite"):
        ReportData.model_validate_json(broken)


# ---------------------------------------------------------------------------------------------------- the page


def test_page_is_well_formed_and_loads_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "<script" not in text and "@import" not in text and "http" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:")), value
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in page.ids


def test_page_has_every_section_and_the_headline_numbers(full: ReportData, folder: Path) -> None:
    text = text_of((folder / "report.html").read_text())
    for title in ("Result", "Read with care", "Held-out slices", "Compensation", "Filter and regenerate", "Settings"):
        assert title in text
    assert "Safer, " in text
    assert f"{100 * (full.aligned.unsafe_rate or 0):.1f}\u202f%".replace("\u202f", " ") in text.replace("\u202f", " ")
    assert all(name.replace("_", " ").capitalize() in text for name in CATEGORIES)


def test_unsafe_text_stays_behind_a_click(full: ReportData, folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    shown, closed = " ".join(page.plain_text), " ".join(page.closed_text)
    unsafe = [a.text for e in full.examples for a in (e.before, e.after) if a.unsafe]
    assert unsafe
    assert all(text not in shown and text in closed for text in unsafe)


def test_examples_show_each_kind_of_outcome_with_pictures(full: ReportData) -> None:
    kinds = {example.why for example in full.examples}
    assert {"was unsafe, is safe", "still unsafe", "harmless, answered"} <= kinds
    assert all(e.picture and e.picture.startswith("data:image/png;base64,") for e in full.examples)
    assert len(full.examples) == 8


def test_hostile_text_is_only_text() -> None:
    evil = '<script>alert(1)</script><img src="https://x.invalid/a.png">'
    few = {"before": answers(0.9, 0.0, 1, count=20), "after": answers(0.1, 0.0, 2, count=20)}
    page = render(report_data(**few, notes=[evil], title=evil, settings={"a": evil}))
    assert "<script" not in page and 'src="https' not in page
    assert "&lt;script&gt;" in page


def test_rendering_is_fast_and_repeatable(full: ReportData) -> None:
    start = time.process_time()
    first = render(full)
    assert time.process_time() - start < 5
    assert render(full) == first


def test_categories_of_equal_rate_are_drawn_by_name() -> None:
    """A set's order differs from process to process, and the page of the same report with it."""
    equal = {name: Interval(value=0.5, low=0.4, high=0.6, n=9) for name in ("fire", "drugs", "spying", "fraud", "arms")}
    drawn = re.findall(r">(Fire|Drugs|Spying|Fraud|Arms)<", plots.categories(equal, equal))
    assert drawn == ["Arms", "Drugs", "Fire", "Fraud", "Spying"]


def test_missing_parts_are_named_and_leave_no_empty_boxes() -> None:
    few = {"before": answers(0.9, 0.0, 1, count=20), "after": answers(0.1, 0.0, 2, count=20)}
    data = report_data(
        **few, guard=None, guard_rounds=[], metrics=None, seconds={}, settings={}, reward_model=None, cost_model=None,
        benchmark=replace(benchmark(prompts(1)), slices=None), examples=0,
    )  # fmt: skip
    page = render(data)
    text = text_of(page)
    for sentence in (
        "No guard was trained", "loop was not run", "No training log", "Times were not recorded", "No settings were",
        "No metrics of the preference models", "names no held-out slices", "No examples were kept",
    ):  # fmt: skip
        assert sentence in text
    assert not re.search(r"<tbody>\s*</tbody>|<figure>\s*</figure>|<div[^>]*>\s*</div>", page)
    assert data.guard is None and "nan" not in text.lower().split()


def test_a_guard_that_judges_one_kind_only() -> None:
    few = {"before": answers(0.9, 0.0, 1, count=20), "after": answers(0.1, 0.0, 2, count=20)}
    guard = {**guard_metrics(), "response": None, "blind_kind": "query", "severity_kappa": None, "macro_f1": 0.7}
    assert "Guard" in text_of(render(report_data(**few, guard=guard)))


def test_a_model_judge_is_never_called_the_truth() -> None:
    judge = ModelJudge(
        lambda prompts, texts: ([0.0] * len(texts), [1.0 if t.startswith("first") else -1.0 for t in texts])
    )
    before, after = answers(0.9, 0.0, 1, count=30), answers(0.1, 0.0, 2, count=30)
    page = text_of(render(report_data(before=before, after=after, benchmark=benchmark(prompts(30), judge))))
    assert "the known truth" not in page
    assert "opinion, not truth" in page and "There is no known truth for this data" in page


def test_judges_without_grades_or_scores_still_give_a_page() -> None:
    from synthetic import FakePolicy

    from safe_rlhf_v.evaluation.judges import CallableJudge, Judgement
    from safe_rlhf_v.evaluation.run import collect

    judge = CallableJudge(lambda prompt, text: Judgement(unsafe=text.startswith("first")), name="a person")
    asked = benchmark(prompts(20), judge)
    sides = [collect(FakePolicy(u, 0.0, i), asked, progress=False) for i, u in enumerate((0.9, 0.1))]
    page = text_of(render(report_data(before=sides[0], after=sides[1], benchmark=asked)))
    assert "By an outside judge (a person)" in page
    assert "does not grade severity" in page and "no plane to draw" in page and "No costs are known" in page


def test_only_harmless_prompts() -> None:
    before, after = (
        [a for a in side if not invites_harm(a.prompt)] for side in (answers(0.9, 0.0, 1), answers(0.1, 0.5, 2))
    )
    data = report_data(before=before, after=after)
    assert data.base.unsafe_rate is None
    assert "so safety was not measured" in text_of(render(data))


def test_one_prompt_is_enough_for_a_page() -> None:
    one = [a for a in answers(1.0, 0.0, 1, count=8) if invites_harm(a.prompt)][:1]
    assert "<h1>" in render(report_data(before=one, after=one, metrics=metrics(1)))


def test_both_sides_answer_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="answered on one side only"):
        report_data(before=answers(0.9, 0.0, 1, count=20), after=answers(0.1, 0.0, 2, count=24))


def test_a_failed_write_leaves_the_old_report(
    full: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(full, tmp_path)
    old = page.read_text()

    def full_disk(self: Path, text: str, **_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(full, tmp_path)
    assert page.read_text() == old


# ---------------------------------------------------------------------------------------------------- parts


def test_metrics_keep_the_later_row_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "cost": 1.0}\n{"step": 2, "cost": 2.0}\n\n{"step": 2, "cost": 3.0}\n{"step": 3, "cost": 4}\n'
    )
    assert [(row["step"], row["cost"]) for row in read_metrics(path)] == [(1, 1.0), (2, 3.0), (3, 4)]
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 1: no key 'step'"):
        read_metrics(path)


def test_long_logs_are_thinned_evenly_to_both_ends() -> None:
    rows = thin([{"step": i, "cost": 0.0, "note": "text", "flag": True} for i in range(5000)])
    assert len(rows) == 600 and rows[0] == {"step": 0.0, "cost": 0.0} and rows[-1]["step"] == 4999


def test_shorten_says_how_much_it_cut() -> None:
    assert shorten("short") == "short"
    assert shorten("a" * 50, 10) == "a" * 10 + " … (40 more characters)"


def test_examples_prefer_variety() -> None:
    before, after = answers(1.0, 0.0, 1, count=60), answers(0.0, 0.0, 2, count=60)
    found = choose_examples(before, after, invites_harm, None, 6)
    safe = [e for e in found if e.why == "was unsafe, is safe"]
    assert len({e.category for e in safe}) == len(safe) >= 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.24, "7.2 s"), (71.2, "1 min 11 s"), (3671, "1 h 01 min"), (59.4, "59.4 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u202f", " ") == text


def test_oracle_judge_is_what_build_report_names() -> None:
    few = answers(0.5, 0.0, 1, count=10)
    data = build_report(
        before=few, after=few, benchmark=benchmark(prompts(10), OracleJudge(Oracle(), name="keeper")),
        constraint={"threshold": 0.0, "final_multiplier": 0.5},
    )  # fmt: skip
    assert data.judge.name == "keeper" and data.judge.kind == JUDGE.kind
