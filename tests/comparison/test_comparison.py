"""Per-prompt figures, the tables that are written, and the page."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from compared import comparison, multiplier_rows, run, table

from safe_rlhf_v.comparison.claims import Claim, judge_claims
from safe_rlhf_v.comparison.comparison import FIGURES, Comparison
from safe_rlhf_v.comparison.page import Failure, PageData, render, write_page
from safe_rlhf_v.comparison.page_rows import p_value
from safe_rlhf_v.comparison.plots import spread
from safe_rlhf_v.comparison.results import result_rows, write_results
from safe_rlhf_v.comparison.runs import REFERENCE, RunInfo, final_multiplier, make_run, multipliers, read_run
from safe_rlhf_v.statistics import compensation


def small() -> Comparison:
    """Four prompts of two answers; the first two invite harm. Unsafe shares 1, .5, 0, 0; mean cost 0.5."""
    unsafe = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], dtype=bool)
    cost = np.array([[4.0, 2], [1, -1], [-1, -1], [1, -1]])
    info = RunInfo(method="m", title="m", stage="policy", seed=0)
    start = make_run(RunInfo(method=REFERENCE, title="", stage="", seed=0), table(~unsafe, cost + 2))
    return Comparison(reference=start, runs=[make_run(info, table(unsafe, cost))])


def test_figures_by_hand() -> None:
    """Of two prompts that invite harm: unsafe 3 of 4 answers; more than half of its answers unsafe: one prompt.

    c > 0 in shares 1, .5, 0, .5 of the answers: above one half on one prompt of four. {c}+ sums to 8 of 8 answers, {c}-
    to 4.
    """
    found = {name: small().estimate("m", name) for name in FIGURES}
    values = {name: e.value for name, e in found.items() if e is not None}
    assert values["unsafe_rate"] == pytest.approx(0.75)
    assert values["prompts_left_unsafe"] == pytest.approx(0.5)
    assert values["helpfulness"] == pytest.approx(2.0)
    assert values["mean_cost"] == pytest.approx(0.5)
    assert values["mean_cost_positive"] == pytest.approx(1.0)
    assert values["mean_cost_negative"] == pytest.approx(0.5)
    assert values["cost_unsafe_rate"] == pytest.approx(0.5)
    assert values["prompts_left_costly"] == pytest.approx(0.25)


def test_compensation_agrees_with_the_report() -> None:
    comparison = small()
    stats = compensation(comparison.runs[0].costs, comparison.runs[0].cost_prompts)
    assert stats.mean_positive == pytest.approx(1.0)
    assert stats.share_above_tau == pytest.approx(0.25)


def test_runs_of_other_prompts_are_refused() -> None:
    other = run("m", 0, 0.1, 0.0, prompts=4)
    with pytest.raises(ValueError, match="answered 4 prompts and the reference 40"):
        Comparison(reference=run(REFERENCE, 0, 0.1, 0.0), runs=[other])


def test_a_missing_judgement_is_left_out_not_zero() -> None:
    answers = table(np.zeros((4, 1), bool), np.zeros((4, 1)))
    empty = answers.set_column(answers.schema.get_field_index("refusal"), "refusal", [[None] * 4])
    start = make_run(RunInfo(method=REFERENCE, title="", stage="", seed=0), empty)
    found = Comparison(reference=start, runs=[])
    assert found.estimate(REFERENCE, "over_refusal_rate") is None
    assert found.estimate(REFERENCE, "helpfulness") is not None


def test_multipliers_of_one_and_of_several_constraints() -> None:
    one, several = (run("m", 0, 0.1, 0.0, metrics=multiplier_rows(*names)) for names in ((), ("a", "b")))
    assert list(multipliers(one)) == [""]
    assert final_multiplier(one) == pytest.approx(1.0)
    assert list(multipliers(several)) == ["a", "b"]
    assert final_multiplier(several) == pytest.approx(2.0)
    assert final_multiplier(run("m", 0, 0.1, 0.0)) is None


def test_parquet_has_a_row_a_run_and_a_row_a_prompt(tmp_path: Path) -> None:
    found = comparison()
    results, by_prompt = write_results(found, tmp_path)
    rows = pq.read_table(results).to_pylist()
    assert len(rows) == 1 + len(found.runs)
    assert rows[0]["method"] == "base"
    first = next(r for r in rows if r["method"] == "ppo_lag" and r["seed"] == 1 and r["requested_cost_reduction"] == 6)
    assert first["only_in_sweep"] is True
    assert first["achieved_cost_reduction"] == pytest.approx(5.9)
    assert first["mean_cost"] == pytest.approx(-4.9)
    assert first["final_multiplier"] == pytest.approx(1.0)
    assert [r["solution_found"] for r in rows].count(False) == 1
    assert pq.read_table(by_prompt).num_rows == 40 * len(found.runs)  # all but the infeasible one, and the reference


def test_a_run_without_a_solution_is_read_and_kept(tmp_path: Path) -> None:
    """It has no answers: it stands in the tables as what it is, and in no mean."""
    info = {"method": "mocan", "title": "MoCAN", "stage": "iterative", "seed": 0, "requested": 9.0, "found": False}
    (tmp_path / "measured.json").write_text(json.dumps(info))
    start = run(REFERENCE, 0, 0.6, 1.0)
    found = Comparison(reference=start, runs=[read_run(tmp_path)])
    assert (found.of("mocan"), found.bounds("mocan")) == ([], [9.0])
    assert [r["solution_found"] for r in result_rows(found)] == [True, False]
    page = render(PageData(comparison=found, findings=[]))
    assert "MoCAN at 9.0 (seed 0)" in page


def test_a_bound_is_shown_where_the_main_one_has_no_solution() -> None:
    runs = [run("m", s, 0.3, -b, requested=b, swept=b < 9, found=b < 9) for s in (0, 1) for b in (1.0, 3.0, 9.0)]
    page = render(PageData(comparison=Comparison(reference=run(REFERENCE, 0, 0.6, 1.0), runs=runs), findings=[]))
    assert "Requested against achieved" in page and "m at 9.0 (seed 0), m at 9.0 (seed 1)." in " ".join(page.split())


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    found = comparison()
    claims = [
        Claim(paper="RePO", text="fewer prompts <unsafe>", method="repo", against="ppo_lag", expect="lower"),
        Claim(paper="CAID", text="undershoots", kind="smallest_bound", method="mocan", expect="lower"),
        Claim(paper="none", text="never run", method="p3o", expect="lower"),
    ]
    failures = [Failure(name="repo seed 4", why="exit code 1", log="Boom\n<tag>")]
    data = PageData(comparison=found, findings=judge_claims(claims, found), failures=failures, bound=4, budget=640)
    page = write_page(data, tmp_path).read_text()
    assert "fewer prompts &lt;unsafe&gt;" in page
    assert "no finished run of p3o" in page
    assert "repo seed 4: exit code 1" in page and "&lt;tag&gt;" in page
    assert "at 12.0 (seed 3)" in page  # the infeasible run, named
    assert page.count("<svg") >= 2 * 4 + 3
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # nothing is loaded
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "#0102" not in page  # every stand-in colour was replaced


def test_the_page_of_a_single_run_without_claims() -> None:
    page = render(PageData(comparison=small(), findings=[]))
    assert "The settings name no claims." in page
    assert "No method was run at two bounds or more" in page
    assert "too few for a claim" in page


def test_labels_do_not_overlap() -> None:
    """Asked for 0, 0.01 and 0.99, 1 with 0.1 between them: pushed up from the bottom, down from the top."""
    assert spread([0.0, 0.01, 0.99, 1.0], 0.1) == pytest.approx([0.0, 0.1, 0.9, 1.0])
    assert spread([0.5], 0.1) == [0.5]


def test_p_values_as_text() -> None:
    assert [p_value(p) for p in (None, 0.0001, 0.0312)] == ["–", "< 0.001", "0.031"]


def test_the_method_to_take_is_held_against_the_control() -> None:
    """The lag is as helpful as the start, less so than imitation alone, which is never the method to take itself."""
    runs = [run("lag", s, 0.2, -3.0, helpful=2.0) for s in range(3)]
    runs += [run("alone", s, 0.05, -3.0, helpful=2.5 + 0.001 * s) for s in range(3)]
    found = Comparison(reference=run(REFERENCE, 0, 0.6, 1.0), runs=runs)
    shared: dict[str, Any] = {"comparison": found, "findings": [], "imitate_alone": ("alone",)}
    page = render(PageData(**shared))
    assert "the lowest unsafe rate of the methods that are not clearly less helpful than the start model" in page
    assert "No method imitates demonstrations" in page
    page = render(PageData(control="alone", **shared))
    assert "lag has the lowest unsafe rate of all methods" in page
    assert "held against the arm that imitates" in page
