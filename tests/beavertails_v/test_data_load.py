"""Every trap of the published releases, one by one: a row is kept, or it is left out with its file, row and reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import official_row, png, write_jsonl, write_parquet

from beavertails_v import (
    ImageLimits,
    Severity,
    SourceError,
    TaxonomyError,
    audit,
    load_comparisons,
    load_responses,
    store,
)

OneFile = Callable[..., Path]


def only_reason(path: Path, **options: Any) -> tuple[str, str]:
    """(reason, detail) of the one row left out of a file whose second row is at fault and the first is not."""
    report = load_comparisons(path, **options).report
    assert report.kept == 1 and [d.row for d in report.dropped] == [2] and report.dropped[0].file == str(path)
    return report.dropped[0].reason, report.dropped[0].detail


def test_all_sixteen_columns_arrive(one_file: OneFile) -> None:
    (pair,) = load_comparisons(one_file(official_row()))
    assert pair.prompt.text == "question 0" and pair.prompt.category == "animal_abuse"
    assert pair.prompt.images[0].encoded() == png(0)
    assert dict(pair.prompt.meta) == {"image_severity": 1}
    assert pair.prompt.severity is None
    assert (pair.more_helpful, pair.safer) == (1, 0)
    first, second = pair.responses
    assert (first.text, first.source, first.safe, first.harmless_rate, first.helpful_rate) == (
        "no, because", "model a", True, 2, 0,
    )  # fmt: skip
    assert (second.text, second.source, second.safe, second.harmless_rate, second.helpful_rate) == (
        "first, then", "model b", False, -2, 3,
    )  # fmt: skip


@pytest.mark.parametrize("one", ["1", 1, 1.0, " 1 "])
def test_ids_may_be_strings_or_numbers(one_file: OneFile, one: Any) -> None:
    two = "2" if isinstance(one, str) else type(one)(2)
    (pair,) = load_comparisons(one_file(official_row(more_helpful_response_id=two, safer_response_id=one)))
    assert (pair.more_helpful, pair.safer) == (1, 0)


@pytest.mark.parametrize("value", ["0", "3", "tie", "", None, "1.5", "-1"])
@pytest.mark.parametrize("column", ["more_helpful_response_id", "safer_response_id"])
def test_an_id_that_is_neither_is_left_out_by_name(one_file: OneFile, column: str, value: Any) -> None:
    reason, detail = only_reason(one_file(official_row(), official_row(1, **{column: value})))
    assert reason == "invalid" and column in detail and repr(value) in detail


def test_ids_of_0_and_1_throughout_are_another_numbering(one_file: OneFile) -> None:
    rows = [official_row(n, more_helpful_response_id=n % 2, safer_response_id=1 - n % 2) for n in range(4)]
    with pytest.raises(SourceError, match="numbered 0 and 1"):
        load_comparisons(one_file(*rows))


@pytest.mark.parametrize(("safe", "unsafe"), [("yes", "no"), ("Yes", "No"), (True, False)])
def test_safe_labels_are_words_or_booleans(one_file: OneFile, safe: Any, unsafe: Any) -> None:
    (pair,) = load_comparisons(one_file(official_row(is_response_1_safe=safe, is_response_2_safe=unsafe)))
    assert [r.safe for r in pair.responses] == [True, False]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"is_response_1_safe": "maybe"}, "is_response_1_safe"),
        ({"is_response_1_safe": "no"}, "contradicts harmless_rate 2"),
        ({"response_1_harmless_rate": -1}, "contradicts harmless_rate -1"),
        ({"response_1_harmless_rate": 4}, "response_1_harmless_rate"),
        ({"response_2_helpful_rate": -1}, "response_2_helpful_rate"),
        ({"response_2_helpful_rate": 4}, "response_2_helpful_rate"),
        ({"category": "animal_abuses"}, "nearest is 'animal_abuse'"),
        ({"category": ""}, "unknown category"),
    ],
)
def test_values_out_of_range_are_left_out_by_name(one_file: OneFile, changes: dict[str, Any], names: str) -> None:
    reason, detail = only_reason(one_file(official_row(), official_row(1, **changes)))
    assert reason == "invalid" and names in detail


def test_a_rate_of_zero_is_safe_and_fractions_are_not_rates(jsonl: OneFile) -> None:
    zero = official_row(image="pictures/0.png", response_1_harmless_rate=0)
    report = load_comparisons(jsonl(zero, zero | {"response_1_harmless_rate": 1.5})).report
    assert report.kept == 1 and "1.5" in report.dropped[0].detail


def test_a_tie_in_rates_is_no_fault(one_file: OneFile) -> None:
    tied = official_row(is_response_2_safe="yes", response_1_harmless_rate=1, response_2_harmless_rate=1)
    (pair,) = load_comparisons(one_file(tied))
    assert pair.tied_safety and pair.safer == 0


CONTRADICTORY = {"safer_response_id": "2"}
IDENTICAL = {"response_2": "no, because"}
EMPTY = {"response_2": " \n"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [(CONTRADICTORY, "contradictory"), (IDENTICAL, "identical"), (EMPTY, "empty")],
)
def test_faults_are_left_out_or_kept_by_name(one_file: OneFile, changes: dict[str, Any], reason: str) -> None:
    path = one_file(official_row(), official_row(1, **changes))
    assert only_reason(path)[0] == reason
    report = load_comparisons(path, keep=[reason]).report
    assert report.kept == 2 and not report.dropped
    assert [(d.row, d.reason) for d in report.tolerated] == [(2, reason)]
    others = [r for r in ("contradictory", "identical", "empty") if r != reason]
    assert only_reason(path, keep=others)[0] == reason


def test_a_row_with_two_faults_needs_both_kept(one_file: OneFile) -> None:
    path = one_file(official_row(), official_row(1, **CONTRADICTORY, **IDENTICAL))
    assert load_comparisons(path, keep=["identical"]).report.counts == {"contradictory": 1}
    assert load_comparisons(path, keep=["identical", "contradictory"]).report.kept == 2


@pytest.mark.parametrize("keep", [["undecodable"], ["contradiction"], "contradictory"])
def test_keep_takes_only_what_can_be_kept(one_file: OneFile, keep: Any) -> None:
    with pytest.raises(SourceError, match="'keep'"):
        load_comparisons(one_file(official_row()), keep=keep)


@pytest.mark.parametrize("question", ["", "  ", None])
def test_a_blank_question_cannot_be_kept(one_file: OneFile, question: Any) -> None:
    path = one_file(official_row(), official_row(1, question=question))
    assert only_reason(path, keep=["empty"])[0] == "empty"


@pytest.mark.parametrize("data", [png(5, (200, 200))[:-200], b"not a picture", b"", None])
def test_a_picture_that_cannot_be_opened(one_file: OneFile, data: Any) -> None:
    reason, detail = only_reason(one_file(official_row(), official_row(1, image={"bytes": data, "path": None})))
    assert reason == "undecodable" and " row " not in detail


def test_a_missing_picture(one_file: OneFile) -> None:
    assert only_reason(one_file(official_row(), official_row(1, image=None)))[0] == "undecodable"


def test_a_file_without_a_column_of_pictures(one_file: OneFile) -> None:
    row = official_row()
    del row["image"]
    with pytest.raises(SourceError, match=r"no usable row(.|\n)*the file has no column of pictures"):
        load_comparisons(one_file(row))
    (pair,) = load_comparisons(one_file(row | {"images": [{"bytes": png(n), "path": None} for n in (1, 2)]}))
    assert [picture.encoded() for picture in pair.prompt.images] == [png(1), png(2)]


def test_limits_are_those_given(one_file: OneFile) -> None:
    path = one_file(official_row(), official_row(1, image={"bytes": png(1, (9, 8)), "path": None}))
    assert only_reason(path, limits=ImageLimits(max_pixels=64))[0] == "undecodable"
    assert load_comparisons(path).report.kept == 2
    # A picture found good under wide limits is looked at again under narrow ones.
    assert only_reason(path, limits=ImageLimits(max_pixels=64))[0] == "undecodable"


def test_header_check_leaves_damage_for_later(one_file: OneFile) -> None:
    path = one_file(official_row(), official_row(1, image={"bytes": png(5, (200, 200))[:-200], "path": None}))
    assert load_comparisons(path, check_images="header").report.kept == 2
    assert load_comparisons(path).report.kept == 1
    assert load_comparisons(path, check_images="none").report.kept == 2
    with pytest.raises(SourceError, match="check_images"):
        load_comparisons(path, check_images="some")  # type: ignore[arg-type]


def test_many_rows_are_checked_on_threads_with_the_same_outcome(
    one_file: OneFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = {"bytes": png(1)[:40], "path": None}
    path = one_file(*(official_row(n, **({"image": damaged} if n % 7 == 3 else {})) for n in range(250)))
    serial = load_comparisons(path)
    monkeypatch.setattr("beavertails_v.load.THREADS_FROM", 1)
    threaded = load_comparisons(path)
    assert threaded.report.dropped == serial.report.dropped and len(serial.report.dropped) == 36
    assert [p.prompt.text for p in threaded] == [p.prompt.text for p in serial]


def test_nothing_disappears(one_file: OneFile, tmp_path: Path) -> None:
    faults = [CONTRADICTORY, IDENTICAL, EMPTY, {"question": ""}, {"image": None}, {"safer_response_id": "0"}]
    rows = [official_row(n, **change) for n, change in enumerate([{}, *faults, {}])]
    report = load_comparisons(path := one_file(*rows)).report
    assert report.kept + len(report.dropped) == len(rows)
    assert report.counts == {"contradictory": 1, "identical": 1, "empty": 2, "undecodable": 1, "invalid": 1}
    assert "kept 2 rows, left out 6" in report.summary()
    assert f"{path} row 2: " in report.summary()
    assert report.summary().count(f"{path} row 6") == 1  # whose picture is missing
    report.write(tmp_path / "report.jsonl")
    written = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == [2, 3, 4, 5, 6, 7]
    assert written[0] | {"detail": ""} == {
        "kept": False, "file": str(path), "row": 2, "reason": "contradictory", "detail": "", "split": "train",
    }  # fmt: skip


def test_the_report_fingerprints_what_was_kept(tmp_path: Path) -> None:
    """Any change of a label, text, picture or column changes it; the name of the file and faulty rows do not."""

    def print_of(name: str, *rows: dict[str, Any]) -> str:
        report = load_comparisons(path := write_parquet(tmp_path / name, rows)).report
        assert [(f.path, f.rows, f.bytes) for f in report.files] == [(str(path), len(rows), path.stat().st_size)]
        return report.fingerprint

    plain = print_of("a.parquet", official_row(), official_row(1))
    assert plain == print_of("b.parquet", official_row(), official_row(1), official_row(2, **IDENTICAL))
    changes: list[dict[str, Any]] = [{"question": "other"}, {"response_2_helpful_rate": 2}, {"image_severity": 2}]
    changes += [{"image": {"bytes": png(7), "path": None}}, {"more_helpful_response_id": "1"}]
    prints = {print_of(f"{n}.parquet", official_row(), official_row(1, **c)) for n, c in enumerate(changes)}
    prints.add(print_of("turned.parquet", official_row(1), official_row()))
    assert len(prints | {plain}) == len(changes) + 2


def test_no_usable_row_is_an_error_with_the_report(one_file: OneFile) -> None:
    with pytest.raises(SourceError, match=r"no usable row among 1(.|\n)*identical: 1"):
        load_comparisons(one_file(official_row(**IDENTICAL)))


def test_unknown_columns_are_kept_as_meta_and_severity_is_read(one_file: OneFile) -> None:
    (pair,) = load_comparisons(
        one_file(official_row(question_severity=2, licence="mine", image_severity=None, list=[1, 2]))
    )
    assert pair.prompt.severity is Severity.MODERATE
    assert dict(pair.prompt.meta) == {"licence": "mine", "list": [1, 2]}


def test_benign_is_no_category(one_file: OneFile) -> None:
    sets = load_comparisons(one_file(official_row(category="benign"), official_row(1)))
    assert [pair.prompt.category for pair in sets] == [None, "animal_abuse"]
    assert [pair.prompt.harmful for pair in sets] == [False, True]


def test_a_missing_category_is_not_benign(one_file: OneFile) -> None:
    """Whether such a prompt invites harm is unknown, and stays so, until its severity says it."""
    rows = [official_row(n, category=None, question_severity=s) for n, s in enumerate([None, 0, 2])]
    sets = load_comparisons(one_file(*rows, official_row(3, category="benign")))
    assert [pair.prompt.harmful for pair in sets] == [None, False, True, False]
    assert audit(sets).categories == {"unknown": 2, "benign": 2}
    with_benign = load_comparisons(one_file(*rows, official_row(3, category="benign")), categories=["benign"])
    assert [pair.prompt.text for pair in with_benign] == ["question 3"]


# -- folders, splits, categories


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Three categories; five rows of training in each, two of evaluation in the first."""
    for category in ("animal_abuse", "terrorism_or_extremism", "benign"):
        rows = [official_row(n, category=category, question=f"{category} {n}") for n in range(5)]
        write_parquet(tmp_path / "data" / category / "train.parquet", rows, row_group_size=2)
    write_parquet(tmp_path / "data/animal_abuse/evaluation.parquet", [official_row(7), official_row(8)])
    return tmp_path


def test_the_folder_or_its_data_folder(official: Path) -> None:
    assert len(load_comparisons(official)) == 15 == len(load_comparisons(official / "data"))
    assert len(load_comparisons(official, "evaluation")) == 2
    # Official order of categories, benign last.
    assert [p.prompt.text for p in load_comparisons(official)][::5] == [
        "terrorism_or_extremism 0",
        "animal_abuse 0",
        "benign 0",
    ]


def test_categories_pick_folders_or_rows(official: Path, one_file: OneFile) -> None:
    chosen = load_comparisons(official, categories=["benign", "animal_abuse"])
    assert {p.prompt.category for p in chosen} == {None, "animal_abuse"} and len(chosen) == 10
    mixed = one_file(official_row(), official_row(1, category="sexual_crimes"), official_row(2, category="benign"))
    assert [p.prompt.text for p in load_comparisons(mixed, categories=["sexual_crimes"])] == ["question 1"]
    assert not load_comparisons(mixed, categories={"benign"}).report.dropped


def test_unknown_and_absent_categories_are_errors(official: Path, one_file: OneFile) -> None:
    with pytest.raises(TaxonomyError, match="nearest is 'animal_abuse'"):
        load_comparisons(official, categories=["animal abuse"])
    with pytest.raises(TaxonomyError, match="give a list"):
        load_comparisons(official, categories="animal_abuse")
    with pytest.raises(SourceError, match="no category 'sexual_crimes'.*there is animal_abuse, benign"):
        load_comparisons(official, categories=["sexual_crimes", "benign"])
    with pytest.raises(SourceError, match="no row of category sexual_crimes"):
        load_comparisons(one_file(official_row()), categories=["animal_abuse", "sexual_crimes"])


def test_a_missing_split_names_what_there_is(official: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no split 'test'; there is evaluation, train"):
        load_comparisons(official, "test")
    with pytest.raises(SourceError, match="asked for"):
        load_comparisons(official / "data/animal_abuse/train.parquet", "evaluation")
    with pytest.raises(SourceError, match="no such file or folder"):
        load_comparisons(tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(SourceError, match="holds no data"):
        load_comparisons(tmp_path / "hollow")


def test_sharded_files_are_one_split(tmp_path: Path) -> None:
    for shard in range(2):
        write_parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", [official_row(shard)])
    assert [p.prompt.text for p in load_comparisons(tmp_path)] == ["question 0", "question 1"]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [official_row()])
    write_jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(SourceError, match="both train.jsonl and train.parquet"):
        load_comparisons(tmp_path)


def test_limit_samples_every_file_alike(official: Path) -> None:
    """Three files of five rows: any six rows are two of each, in file order, the same every time, not the first two."""
    limited = load_comparisons(official, limit=6)
    texts = [p.prompt.text for p in limited]
    assert [t.split()[0] for t in texts] == ["terrorism_or_extremism"] * 2 + ["animal_abuse"] * 2 + ["benign"] * 2
    assert texts == sorted(texts, key=[p.prompt.text for p in load_comparisons(official)].index)
    assert texts == [p.prompt.text for p in load_comparisons(official, limit=6)]
    assert any(not t.endswith(("0", "1")) for t in texts)
    assert {p.prompt.text for p in load_comparisons(official, limit=3)} <= set(texts)
    assert "limit=6: a fixed sample over all 15 rows, 9 were not looked at" in limited.report.summary()
    assert len(load_comparisons(official, limit=0)) == 0
    assert not load_comparisons(official, limit=15).report.notes


def test_limit_counts_rows_kept(one_file: OneFile) -> None:
    """A faulty row that the sample meets is replaced by another."""
    rows = [official_row(n, **IDENTICAL) if n % 2 else official_row(n) for n in range(20)]
    limited = load_comparisons(one_file(*rows), limit=8)
    assert len(limited) == 8 and set(limited.report.counts) == {"identical"}
    assert f"{20 - 8 - len(limited.report.dropped)} were not looked at" in limited.report.summary()
    assert len(load_comparisons(one_file(*rows), limit=11)) == 10


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [official_row(n) for n in range(50)])
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(SourceError, match="rows.parquet: not a parquet file, or damaged"):
        load_comparisons(path)
    with pytest.raises(SourceError, match=r"neither a .parquet nor a .jsonl"):
        load_comparisons((tmp_path / "rows.csv").parent / write_jsonl(tmp_path / "rows.csv", []).name)


# -- what is recognised by its columns


SINGLE = {
    "question": "q", "category": "animal_abuse", "image_severity": 1,
    "response": "first, then", "is_response_safe": "no",
}  # fmt: skip


def test_the_single_response_release_is_named_and_sent_on(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "data/animal_abuse/train.parquet", [SINGLE | {"image": {"bytes": png(), "path": None}}]
    )
    with pytest.raises(SourceError, match=r"single-response release(.|\n)*load_responses"):
        load_comparisons(tmp_path)
    (record,) = load_responses(tmp_path)
    assert (
        record.response.text == "first, then" and not record.response.safe and record.prompt.category == "animal_abuse"
    )
    assert path.exists()


def test_pairs_unroll_into_responses(one_file: OneFile) -> None:
    rows = [official_row(0), official_row(1, **EMPTY), official_row(2, safer_response_id="tie")]
    responses = load_responses(one_file(*rows))
    assert [(r.prompt.text, r.response.text) for r in responses] == [
        ("question 0", "no, because"),
        ("question 0", "first, then"),
        ("question 1", "no, because"),
        ("question 2", "no, because"),
        ("question 2", "first, then"),
    ]
    assert responses.report.counts == {"empty": 1}
    assert [p.text for p in responses.prompts()] == ["question 0", "question 1", "question 2"]
    assert len(load_responses(one_file(*rows), keep=["empty"])) == 6
    assert len(load_responses(one_file(*rows), limit=3)) == 3


def test_pku_saferlhf_is_text_with_ids_0_and_1(tmp_path: Path) -> None:
    row = {
        "prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False,
        "response_0_severity_level": 0, "response_1_severity_level": 3, "better_response_id": 1, "safer_response_id": 0,
        "response_1_harm_category": {"Animal Abuse": True},
    }  # fmt: skip
    write_jsonl(tmp_path / "data" / "Alpaca-7B" / "train.jsonl", [row])
    (pair,) = load_comparisons(tmp_path)
    assert (pair.more_helpful, pair.safer) == (1, 0) and pair.prompt.images == ()
    assert [r.severity for r in pair.responses] == [Severity.NONE, Severity.SEVERE]
    assert [r.harmless_rate for r in pair.responses] == [None, -3]
    assert pair.prompt.meta["response_1_harm_category"] == {"Animal Abuse": True}
    assert pair.prompt.category is None and pair.prompt.harmful is None
    with pytest.raises(SourceError, match="no column of categories"):
        load_comparisons(tmp_path, categories=["animal_abuse"])


def test_other_layouts_are_told_apart(tmp_path: Path) -> None:
    merged = write_jsonl(tmp_path / "merged.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(SourceError, match="one merged preference"):
        load_comparisons(merged)
    renamed = official_row(image="x.png")
    renamed["safer"] = renamed.pop("safer_response_id")
    other = write_jsonl(tmp_path / "other.jsonl", [renamed])
    with pytest.raises(SourceError, match="which also has safer_response_id"):
        load_comparisons(other)


def test_a_data_set_is_a_column_map(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        """
        name: own
        title: a set of mine
        kind: comparisons
        columns: {question: ask, response: [a, b], safe: [a_ok, b_ok], more_helpful: best, safer: safest}
        required: [ask, a, b, best, safest]
        ids: [left, right]
        safe_words: {fine: true, bad: false}
        """
    )
    row = {"ask": "q", "a": "1", "b": "2", "a_ok": "fine", "b_ok": "bad", "best": "right", "safest": "left"}
    (pair,) = load_comparisons(write_jsonl(tmp_path / "x.jsonl", [row]), columns=tmp_path / "own.yaml")
    assert (pair.more_helpful, pair.safer, pair.responses[1].safe) == (1, 0, False)
    with pytest.raises(SourceError, match="needs question, response_1"):
        load_comparisons(tmp_path / "x.jsonl", columns="beavertails_v")
    (tmp_path / "bad.yaml").write_text("name: x\ntitle: x\nkind: comparisons\ncolumns: {quest: a}\nids: [1, 2]")
    with pytest.raises(SourceError, match="unknown field 'quest'"):
        load_comparisons(tmp_path / "x.jsonl", columns=tmp_path / "bad.yaml")


# -- what loading gives


def test_the_set_is_a_lazy_sequence(official: Path) -> None:
    pairs = load_comparisons(official)
    assert pairs[-1].prompt.text == "benign 4" and pairs[0] == next(iter(pairs))
    first, last = "terrorism_or_extremism 0", "benign 4"
    assert [p.prompt.text for p in pairs.select([14, 0, 0])] == [last, first, first]
    assert len(pairs[3:7]) == 4 and pairs[3:7][0] == pairs[3]
    assert type(pairs[3:7]) is type(pairs)
    with pytest.raises(IndexError):
        _ = pairs[15]
    assert pairs.origin(6) == (str(official / "data/animal_abuse/train.parquet"), 2)
    assert pairs[6].prompt.text == "animal_abuse 1"


def test_prompts_are_unique_by_id_and_in_order(one_file: OneFile) -> None:
    again = official_row(0, response_1="another answer")
    sets = load_comparisons(one_file(official_row(1), official_row(0), again))
    assert [p.text for p in sets.prompts()] == ["question 1", "question 0"]


def test_pictures_are_read_from_their_own_row_group(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CACHE_BYTES", 1)  # nothing is kept at hand, so every read goes to the file
    pairs = load_comparisons(official, categories=["animal_abuse"])
    for n in (4, 0, 3, 1, 2):
        assert len(store._CACHE._groups) == 1
        assert pairs[n].prompt.images[0].encoded() == png(n)
        assert pairs[n].prompt.images[0].load().getpixel((0, 0)) == (n, 0, 7)


def test_the_set_and_its_pictures_can_be_sent_to_workers(official: Path) -> None:
    pairs = load_comparisons(official)
    again = pickle.loads(pickle.dumps(pairs))
    assert list(again) == list(pairs)
    assert len(pickle.dumps(pairs[0].prompt.images[0])) < 1000
