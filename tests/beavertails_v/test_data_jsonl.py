"""Pairs in a jsonl file with pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import official_row, png, write_jsonl

from beavertails_v import SourceError, load_comparisons, load_responses

Make = Callable[..., Path]


def test_pictures_are_named_relative_to_the_file(jsonl: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = jsonl(official_row(image="pictures/0.png"))
    monkeypatch.chdir("/")
    (pair,) = load_comparisons(path)
    assert pair.prompt.images[0].encoded() == png(0)
    assert "image" not in pair.prompt.meta


def test_a_folder_with_a_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for split in ("train", "evaluation"):
        write_jsonl(tmp_path / f"{split}.jsonl", [official_row(image="a.png", question=split)])
    assert [p.prompt.text for p in load_comparisons(tmp_path, "evaluation")] == ["evaluation"]


def test_several_pictures_none_and_a_forgotten_one(jsonl: Make) -> None:
    row = official_row()
    del row["image"]
    pairs = load_comparisons(
        jsonl(row | {"images": ["pictures/0.png", "pictures/0.png"]}, row | {"images": []}, row, row | {"image": 3})
    )
    assert [len(pair.prompt.images) for pair in pairs] == [2, 0]
    assert [(d.row, d.reason) for d in pairs.report.dropped] == [(3, "undecodable"), (4, "undecodable")]
    assert '"images": []' in pairs.report.dropped[0].detail


def test_only_the_necessary_fields(jsonl: Make) -> None:
    needed = ("question", "response_1", "response_2", "more_helpful_response_id", "safer_response_id")
    row = {name: value for name, value in official_row().items() if name in needed}
    row |= {"image": "pictures/0.png", "is_response_1_safe": "yes", "is_response_2_safe": "no"}
    (pair,) = load_comparisons(jsonl(row))
    assert pair.prompt.category is None and pair.responses[0].harmless_rate is None
    del row["is_response_1_safe"]
    assert (
        "neither a safe label nor a harmless rate"
        in load_comparisons(jsonl(row, official_row(image="pictures/0.png"))).report.summary()
    )


def test_safe_follows_from_the_rate_where_it_is_not_said(jsonl: Make) -> None:
    row = official_row(image="pictures/0.png")
    del row["is_response_1_safe"], row["is_response_2_safe"]
    assert [r.response.safe for r in load_responses(jsonl(row))] == [True, False]


def test_escaping_names_are_left_out(jsonl: Make, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}.png"
    outside.write_bytes(png())
    (tmp_path / "link.png").symlink_to(outside)
    names = ["pictures/0.png", f"../{outside.name}", str(outside), "link.png", "pictures/none.png"]
    report = load_comparisons(jsonl(*(official_row(n, image=name) for n, name in enumerate(names)))).report
    assert report.kept == 1 and [d.row for d in report.dropped] == [2, 3, 4, 5]
    assert report.counts == {"undecodable": 4} and f"row 2: image '../{outside.name}' lies outside" in report.summary()


def test_broken_lines_are_left_out_by_number(jsonl: Make) -> None:
    path = jsonl(official_row(image="pictures/0.png"))
    with path.open("ab") as file:
        file.write(b'{"question": \n[1]\n"caf\xe9"\n' + b"[" * 100_000 + b"\n")
    report = load_comparisons(path).report
    assert [(d.row, d.reason) for d in report.dropped] == [(n, "invalid") for n in range(2, 6)]


def test_blank_lines_are_no_rows_and_do_not_shift_the_count(jsonl: Make) -> None:
    path = jsonl(official_row(image="pictures/0.png"))
    with path.open("ab") as file:
        file.write(b"\n  \r\n[1]\n\n")
    report = load_comparisons(path).report
    assert report.kept == 1 and [(d.row, d.reason, d.split) for d in report.dropped] == [(4, "invalid", "train")]


def test_values_of_other_types_are_left_out(jsonl: Make) -> None:
    good = official_row(image="pictures/0.png")
    bad = [{"question": 5}, {"category": ["animal_abuse"]}, {"safer_response_id": True}, {"response_1": ["a"]}]
    bad += [{"response_1_harmless_rate": "--1"}, {"response_1_helpful_rate": True}, {"question": "half \ud83d"}]
    report = load_comparisons(jsonl(good, *(good | change for change in bad)), categories=["animal_abuse"]).report
    # The row whose category is a list is of no category that was asked for.
    assert report.counts == {"invalid": len(bad) - 1}


def test_a_byte_order_mark_and_windows_line_ends(jsonl: Make) -> None:
    path = jsonl(official_row(image="pictures/0.png"), official_row(1, image="pictures/0.png"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load_comparisons(path)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ('{"question": "a",\n"b": 1}\n', "no line is JSON.*row 1: the line is not JSON")],
)
def test_a_file_without_any_row_says_so(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(SourceError, match=words):
        load_comparisons(tmp_path)


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "block"), [("configs/own_data.yaml", r"# +(\{\"image\".*\n)"), ("docs/data.md", r"```json\n([^`]*)```")]
)
def test_the_sample_line_of_the_documentation_loads_as_it_stands(tmp_path: Path, file: str, block: str) -> None:
    """Copied letter for letter, the comment's mark aside, beside a picture of that name."""
    (sample,) = re.findall(block, (ROOT / file).read_text())
    (tmp_path / "train.jsonl").write_text(sample)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png())
    found = load_comparisons(tmp_path)
    assert len(found) == 1 and not found.report.dropped
