"""Which files are the data, how their columns are read, and that no label is read by guess."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import official_row, png, write_jsonl, write_parquet
from datasets import Dataset, DatasetDict, config

from beavertails_v import ExportError, Response, SchemaError, SourceError, load_comparisons, write_beavertails_v
from beavertails_v.locate import splits

TEXT = official_row() | {"images": []}
del TEXT["image"]


def texts(source: Path, split: str = "train") -> list[str]:
    return [pair.prompt.text for pair in load_comparisons(source, split)]


@pytest.mark.parametrize(
    "place", [".ipynb_checkpoints/train.jsonl", ".git/train.parquet", ".train.jsonl", "data/.x/train.jsonl"]
)
def test_what_is_hidden_is_never_data(tmp_path: Path, place: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [TEXT])
    write_jsonl(tmp_path / place, [TEXT | {"question": "hidden"}])
    assert texts(tmp_path) == ["question 0"]


def test_a_folder_beside_the_data_hides_nothing_and_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [TEXT])
    write_jsonl(tmp_path / "backup" / "train.jsonl", [TEXT | {"question": "old"}])
    write_jsonl(tmp_path / "backup" / "other.jsonl", [TEXT])
    assert texts(tmp_path) == ["question 0"]
    assert "backup/train.jsonl is not read" in load_comparisons(tmp_path).report.summary()


def test_two_layouts_that_hold_the_split_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [TEXT])
    write_parquet(tmp_path / "data/animal_abuse/train.parquet", [official_row()])
    with pytest.raises(SourceError, match="both data/animal_abuse/train.parquet and train.jsonl"):
        load_comparisons(tmp_path)
    with pytest.raises(ExportError, match="holds train.jsonl already"):
        write_beavertails_v([], tmp_path, "evaluation")


def test_shards_with_a_hash_are_one_split_and_none_may_be_missing(tmp_path: Path) -> None:
    for n, tag in enumerate(("a09b74b3ef9c3b56", "0b1c2d3e4f5a6b7c")):
        write_parquet(tmp_path / f"data/train-0000{n}-of-00002-{tag}.parquet", [official_row(n)])
    assert texts(tmp_path) == ["question 0", "question 1"]
    (tmp_path / "data/train-00001-of-00002-0b1c2d3e4f5a6b7c.parquet").unlink()
    with pytest.raises(SourceError, match="number 00001 is not there"):
        load_comparisons(tmp_path)
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [official_row()])
    with pytest.raises(SourceError, match=r"both .* and .* hold the split"):
        load_comparisons(tmp_path)


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("evaluation", "train", "notes"):
        write_jsonl(tmp_path / f"{name}.jsonl", [TEXT])
    assert splits(tmp_path) == ["train", "evaluation"]


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(TEXT).encode()))
    assert texts(tmp_path) == ["question 0"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.csv", "a,b\n", r"load_dataset\('csv'"),
        ("train/state.json", "{}", "save_to_disk"),
        ("shard-0.tar", "", "WebDataset"),
        ("class/a.png", "", "imagefolder"),
        ("train.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("train.jsonl", "\ufeff{}", "UTF-16"),
        ("train.jsonl", "<!DOCTYPE html>\n<html>", "web page"),
        ("train.jsonl", "PAR1....", "parquet file, going by its content"),
        ("train.jsonl", '{\n "question": "q"\n}', "over several lines"),
        ("train.jsonl", '[{"question": "q"}]', "a JSON list"),
        ("train.JSONL", "{}", "small letters"),
        ("train.ndjson", "{}", "holds train.ndjson"),
        ("train.jsonl.zst", "", "unpack it"),
        ("train.jsonl.gz", "{}", r"train\.jsonl\.gz: not compressed by gzip"),
        ("a/b/c/train.jsonl", "{}", r"name the folder .*a/b/c"),
    ],
)
def test_other_kinds_of_data_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-16-le" if words == "UTF-16" else "utf-8")
    with pytest.raises(SourceError, match=words):
        load_comparisons(tmp_path)


def test_a_compressed_file_that_is_cut_is_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps(TEXT | {"question": str(i**9)}) + "\n" for i in range(400))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-400])
    with pytest.raises(SourceError, match=r"train\.jsonl\.gz: .*cut short"):
        load_comparisons(tmp_path)


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/animal_abuse/train.parquet", [official_row()])
    (tmp_path / "data/benign").mkdir()
    (tmp_path / "data/benign/train.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(SourceError, match=r"benign/train.parquet: a link to .*gone.parquet, which is not there"):
        load_comparisons(tmp_path)


def test_a_folder_of_no_category_beside_categories_is_named(tmp_path: Path) -> None:
    for folder in ("animal_abuse", "animal_abuse_old"):
        write_parquet(tmp_path / f"data/{folder}/train.parquet", [official_row()])
    pairs = load_comparisons(tmp_path)
    assert len(pairs) == 2 and "data/animal_abuse_old/train.parquet is read too" in pairs.report.summary()
    assert len(pairs.report.notes) == 1


def test_an_empty_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", [TEXT])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="empty text"):
        load_comparisons("")


def test_a_picture_at_fault_names_its_row_once(tmp_path: Path) -> None:
    rows = [TEXT, TEXT | {"images": ["none.png"]}]
    report = load_comparisons(write_jsonl(tmp_path / "x.jsonl", rows)).report
    assert [str(left).count("row 2") for left in report.dropped] == [1]
    assert report.summary().count("row 2") == 1 and "none.png" in report.summary()


# -- labels


@pytest.mark.parametrize("odd", [None, "", -1, float("nan"), "tie", 2.5])
@pytest.mark.parametrize("options", [{}, {"limit": 1}])
def test_ids_of_0_and_1_beside_what_is_no_id(tmp_path: Path, odd: Any, options: dict[str, Any]) -> None:
    ids = [1, 1, 1, 0, odd]
    rows = [TEXT | {"more_helpful_response_id": i, "safer_response_id": 1} for i in ids]
    with pytest.raises(SourceError, match="numbered 0 and 1"):
        load_comparisons(write_jsonl(tmp_path / "x.jsonl", rows), **options)


def test_one_column_numbered_otherwise_and_ids_one_too_high(tmp_path: Path) -> None:
    mixed = [TEXT | {"more_helpful_response_id": 1 + n % 2, "safer_response_id": n % 2} for n in range(10)]
    with pytest.raises(SourceError, match="'safer_response_id': the responses are numbered 0 and 1"):
        load_comparisons(write_jsonl(tmp_path / "x.jsonl", mixed))
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False}
    pku = [row | {"better_response_id": i, "safer_response_id": 1} for i in (1, 2)]
    with pytest.raises(SourceError, match="numbered 1 and 2"):
        load_comparisons(write_jsonl(tmp_path / "y.jsonl", pku))


@pytest.mark.parametrize(("safe", "unsafe"), [("True", "False"), (" true", "FALSE")])
def test_booleans_in_text_are_read(tmp_path: Path, safe: Any, unsafe: Any) -> None:
    row = TEXT | {"is_response_1_safe": safe, "is_response_2_safe": unsafe, "more_helpful_response_id": "2.0"}
    (pair,) = load_comparisons(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert [r.safe for r in pair.responses] == [True, False] and pair.more_helpful == 1
    with pytest.raises(SchemaError, match="neither True nor False"):
        Response(text="a", safe="false")  # type: ignore[arg-type]


def test_a_key_twice_and_an_unknown_category_of_a_response_are_invalid_rows(tmp_path: Path) -> None:
    line = json.dumps(TEXT)
    twice = line[:-1] + ', "safer_response_id": "2"}'
    wrong = json.dumps(TEXT | {"response_2_category": "animal_abuses"})
    (tmp_path / "train.jsonl").write_text("\n".join([line, twice, wrong]))
    report = load_comparisons(tmp_path).report
    assert [(d.row, d.reason) for d in report.dropped] == [(2, "invalid"), (3, "invalid")]
    assert "'safer_response_id' stands twice" in report.summary() and "nearest is 'animal_abuse'" in report.summary()


def test_text_that_is_not_utf8_is_that_rows_fault_and_no_fault_in_a_column_nobody_reads(tmp_path: Path) -> None:
    rows = [official_row(n) for n in range(3)]
    table = pa.Table.from_pylist(rows)

    def bad(good: list[str], at: int) -> pa.Array:
        data = [text.encode() for text in good]
        data[at] = b"caf\xe9"
        return pa.Array.from_buffers(pa.string(), 3, pa.array(data, pa.binary()).buffers())

    questions = bad([row["question"] for row in rows], 1)
    table = table.set_column(0, "question", questions).append_column("note", bad(["a", "b", "c"], 2))
    pq.write_table(table, tmp_path / "train.parquet")
    pairs = load_comparisons(tmp_path)
    assert [p.prompt.text for p in pairs] == ["question 0", "question 2"]
    (left,) = pairs.report.dropped
    assert (left.row, left.reason) == (2, "invalid") and "'question' is not UTF-8" in left.detail
    assert "1 values of column 'note' cannot be read" in pairs.report.summary()


def test_misspelt_columns_are_named(tmp_path: Path) -> None:
    row = TEXT | {"catagory": "animal_abuse", "licence": "mine"}
    del row["category"]
    report = load_comparisons(write_jsonl(tmp_path / "x.jsonl", [row])).report
    assert report.unused == ["catagory", "licence"] and len(report.notes) == 1
    assert "column 'catagory' is not used; did you mean 'category'?" in report.notes[0]
    assert not load_comparisons(write_jsonl(tmp_path / "y.jsonl", [row | {"category": "benign"}])).report.notes


def test_a_map_whose_column_of_pictures_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(MAP.replace("images: picture", "images: pictur"))
    with pytest.raises(SourceError, match="the column map names 'pictur', which is not there; did you mean 'picture'"):
        load_comparisons(write_jsonl(tmp_path / "x.jsonl", [ROW]), columns=tmp_path / "own.yaml")


# -- pictures


@pytest.mark.parametrize("null", [None, [], ""])
def test_an_empty_column_of_pictures_gives_way_to_its_sister(tmp_path: Path, null: Any) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    rows = [TEXT | {"image": "a.png", "images": null}, TEXT | {"image": null or None, "images": ["a.png"]}]
    pairs = load_comparisons(write_jsonl(tmp_path / "train.jsonl", rows))
    assert [p.prompt.images[0].encoded() for p in pairs] == [png(3)] * 2
    (tmp_path / "b.png").write_bytes(png(4))
    both = write_jsonl(tmp_path / "both.jsonl", [rows[0], TEXT | {"image": "a.png", "images": ["b.png"]}])
    assert "hold different ones" in load_comparisons(both).report.dropped[0].detail


def test_parquet_with_both_columns_names_and_base64(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    whole = {"bytes": png(3), "path": None}
    rows = [official_row(image=None, images=[whole]), official_row(image={"bytes": None, "path": "a.png"}, images=None)]
    pairs = load_comparisons(write_parquet(tmp_path / "x.parquet", rows))
    assert [p.prompt.images[0].encoded() for p in pairs] == [png(3)] * 2
    pixels = write_parquet(tmp_path / "y.parquet", [official_row(image=[[1, 2], [3, 4]])])
    with pytest.raises(SourceError, match=r"given as numbers|neither a file's bytes"):
        load_comparisons(pixels)


# -- column maps

MAP = """
name: own
kind: comparisons
columns: {question: ask, images: picture, response: [a, b], safe: [a_ok, b_ok], more_helpful: best, safer: safest}
ids: [0, 1]
safe_words: {yes: true, no: false}
"""
ROW = {"ask": "q", "picture": [], "a": "1", "b": "2", "a_ok": "no", "b_ok": "yes", "best": 0, "safest": 1}


@pytest.mark.parametrize(
    "change", [(), ("{yes: true, no: false}", "{'YES': 'true', 'No': 'false'}"), ("[0, 1]", "['0', 1.0]")]
)
def test_a_map_is_read_as_it_is_written(tmp_path: Path, change: tuple[str, ...]) -> None:
    (tmp_path / "own.yaml").write_text(MAP.replace(*change) if change else MAP)
    (pair,) = load_comparisons(write_jsonl(tmp_path / "x.jsonl", [ROW]), columns=tmp_path / "own.yaml")
    assert (pair.more_helpful, pair.safer, [r.safe for r in pair.responses]) == (0, 1, [False, True])


def test_the_words_of_a_map_hold_for_booleans_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(MAP.replace("{yes: true, no: false}", "{true: false, false: true}"))
    row = ROW | {"a_ok": True, "b_ok": False}  # the columns say which is flagged
    (pair,) = load_comparisons(write_jsonl(tmp_path / "x.jsonl", [row]), columns=tmp_path / "own.yaml")
    assert [r.safe for r in pair.responses] == [False, True]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (MAP, "", "the file is empty"),
        (MAP, "- a", "not a mapping"),
        ("[0, 1]", "[0, 1", "line"),
        ("ids: [0, 1]", "ids: [0, 1]\nids: [1, 0]", "'ids' stands twice"),
        (", safer: safest", "", "'safer' is missing"),
        ("[a, b]", "ab", "'response' under 'columns' is 'ab'; it needs a list of two columns"),
        ("[a_ok, b_ok]", "[a_ok, a_ok]", "'a_ok' stands twice"),
        ("more_helpful:", "more_helpfull:", "did you mean 'more_helpful'"),
        ("name: own", "name: own\nkeys: 1", "unknown field 'keys'"),
        ("kind: comparisons", "kind: pairs", "'kind' is 'pairs'"),
        ("[0, 1]", "[1, 1]", "two different entries"),
        ("no: false", "no: maybe", "'maybe' is neither true nor false"),
        ("no: false", "no: true", "one that is false"),
        ("no: false", "true: false", "gives one of 'true' and 'false'"),
        ("no: false", "no: false, ~: false", "'safe_words': a word is null"),
        ("[a, b]", "!!set {a, b}", "'!!set' is not used here"),  # it has no order, and the labels have one
        ("[a, b]", "!!omap [a: 1, b: 2]", "'!!omap' is not used here"),
        ("name: own", "name: !!binary aGk=", "'!!binary' is not used here"),
        ("[a, b]", "[[a], b]", "field 'columns.response.0' is"),
    ],
)
def test_a_broken_map_names_itself_and_its_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(MAP.replace(old, new))
    with pytest.raises(SourceError, match=rf"own\.yaml(.|\n)*{words}"):
        load_comparisons(write_jsonl(tmp_path / "x.jsonl", [ROW]), columns=tmp_path / "own.yaml")
    with pytest.raises(SourceError, match="no such file"):
        load_comparisons(tmp_path / "x.jsonl", columns=tmp_path / "none.yaml")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (folder / "a.png").write_bytes(png(1))
    return [official_row(n, image="a.png") for n in range(3)]


def as_csv(folder: Path) -> None:
    Dataset.from_list(rows_of(folder)).to_csv(folder / "train.csv")


def as_tsv(folder: Path) -> None:
    Dataset.from_list(rows_of(folder)).to_csv(folder / "train.tsv", sep="\t")


def as_list(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(rows_of(folder)))


def as_saved(folder: Path) -> None:
    DatasetDict(train=Dataset.from_list([official_row(n) for n in range(3)])).save_to_disk(folder)


@pytest.mark.parametrize("write", [as_csv, as_tsv, as_list, as_saved])
def test_what_is_said_of_other_formats_converts_them(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of Python, run as it is printed and wherever one stands, makes a folder that is read."""
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "d"
    folder.mkdir()
    write(folder)
    with pytest.raises(SourceError, match="in Python: ") as refused:
        load_comparisons(folder)
    exec(str(refused.value).partition("in Python: ")[2], {})
    found = load_comparisons(folder)
    assert len(found) == 3 and found[2].prompt.images[0].load().size == (8, 8)
    assert [(x.more_helpful, x.safer) for x in found] == [(1, 0)] * 3
