from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beavertails_v import (
    Comparison,
    ExportError,
    Picture,
    Prompt,
    Response,
    Severity,
    Taxonomy,
    load_comparisons,
    write_beavertails_v,
)
from beavertails_v.export import OFFICIAL

rates = st.integers(-3, 3)


@st.composite
def responses(draw: Any, text: str) -> Response:
    rate = draw(st.none() | rates)
    return Response(
        text=text,
        safe=draw(st.booleans()) if rate is None else rate >= 0,
        harmless_rate=rate,
        helpful_rate=draw(st.none() | st.integers(0, 3)),
        source=draw(st.sampled_from([None, "model a"])),
        category=draw(st.sampled_from([None, "horror_and_gore"])),
    )


@st.composite
def comparisons(draw: Any) -> Comparison:
    n = draw(st.integers(0, 999))
    category = draw(st.none() | st.sampled_from(Taxonomy.load().secondary))
    prompt = Prompt(
        text=draw(st.text(min_size=1).filter(lambda t: t.strip() and t.isprintable())),
        images=(Picture.from_bytes(png(n)),),
        category=category,
        benign=category is None and draw(st.booleans()),
        severity=draw(st.none() | st.sampled_from(Severity)),
        meta=draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "picture_world": st.text(),
                    "image_severity": st.integers(0, 3),
                    "tags": st.lists(st.text(), min_size=1),
                },
            )
        ),
    )
    pair = Comparison(
        prompt=prompt,
        responses=(draw(responses("a")), draw(responses("b"))),
        more_helpful=draw(st.integers(0, 1)),
        safer=draw(st.integers(0, 1)),
    )
    return pair


def pair(n: int = 0, **changes: Any) -> Comparison:
    prompt = Prompt(text=f"q {n}", images=(Picture.from_bytes(png(n)),), category="animal_abuse")
    fields: dict[str, Any] = {
        "prompt": prompt,
        "responses": (Response(text="a", safe=True, harmless_rate=1), Response(text="b", safe=False, harmless_rate=-1)),
        "more_helpful": 1,
        "safer": 0,
    }
    return Comparison(**fields | changes)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.lists(comparisons(), min_size=1, max_size=6))
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, pairs: list[Comparison]) -> None:
    folder = tmp_path_factory.mktemp("set")
    write_beavertails_v(pairs, folder, "train")
    again = load_comparisons(folder, keep=["contradictory"])
    assert not again.report.dropped
    order = [*((name, False) for name in Taxonomy.load().secondary), (None, True), (None, False)]
    assert list(again) == sorted(pairs, key=lambda p: order.index((p.prompt.category, p.prompt.benign)))


def test_the_official_columns_in_official_order_and_types(tmp_path: Path) -> None:
    (path,) = write_beavertails_v([pair()], tmp_path, "train")
    assert path == tmp_path / "data/animal_abuse/train.parquet"
    schema = pq.read_schema(path)
    assert schema.names == [
        "question", "image", "category", "image_severity", "response_1", "response_2", "response_1_from",
        "response_2_from", "more_helpful_response_id", "is_response_1_safe", "is_response_2_safe", "safer_response_id",
        "response_1_harmless_rate", "response_2_harmless_rate", "response_1_helpful_rate", "response_2_helpful_rate",
    ]  # fmt: skip
    assert schema.types == list(OFFICIAL.values())
    assert schema.field("more_helpful_response_id").type == pa.string()
    (row,) = pq.read_table(path).to_pylist()
    assert (row["more_helpful_response_id"], row["safer_response_id"]) == ("2", "1")
    assert (row["is_response_1_safe"], row["is_response_2_safe"]) == ("yes", "no")
    assert row["image"] == {"bytes": png(0), "path": None}


def test_extra_columns_stand_after_the_official_ones(tmp_path: Path) -> None:
    prompt = Prompt(text="q", images=(Picture.from_bytes(png()),), severity=Severity.SEVERE, meta={"world": "{}"})
    (path,) = write_beavertails_v([pair(), pair(prompt=prompt)], tmp_path, "train")[1:]
    assert path == tmp_path / "data/uncategorised/train.parquet"
    assert set(pq.read_schema(path).names[16:]) == {"question_severity", "world"}
    (row,) = pq.read_table(path).to_pylist()
    assert row["category"] is None and row["question_severity"] == 3 and row["world"] == "{}"


def test_row_groups_of_a_hundred(tmp_path: Path) -> None:
    (path,) = write_beavertails_v([pair(n) for n in range(250)], tmp_path, "train")
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [100, 100, 50]
    assert [p.prompt.text for p in load_comparisons(tmp_path)] == [f"q {n}" for n in range(250)]


def test_the_datasets_library_sees_an_image(tmp_path: Path) -> None:
    import datasets

    write_beavertails_v([pair(5)], tmp_path / "set", "train")
    files = str(tmp_path / "set/data/animal_abuse/train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["more_helpful_response_id"].dtype == "string"
    assert loaded[0]["image"].getpixel((0, 0)) == (5, 0, 7)


def test_a_stream_is_taken_once(tmp_path: Path) -> None:
    def stream() -> Iterator[Comparison]:
        yield from (pair(n) for n in range(3))

    write_beavertails_v(stream(), tmp_path, "train")
    assert len(load_comparisons(tmp_path)) == 3


def test_a_split_is_not_mixed_with_an_older_one(tmp_path: Path) -> None:
    write_beavertails_v([pair(), pair(1, prompt=Prompt(text="q", images=pair().prompt.images))], tmp_path, "train")
    with pytest.raises(ExportError, match="overwrite=True"):
        write_beavertails_v([pair(2)], tmp_path, "train")
    assert len(load_comparisons(tmp_path)) == 2
    write_beavertails_v([pair(3)], tmp_path, "evaluation")
    write_beavertails_v([pair(2)], tmp_path, "train", overwrite=True)  # in place of pair(), read above
    (again,) = load_comparisons(tmp_path)
    assert again.prompt.text == "q 2" and again.prompt.images[0].encoded() == png(2)
    assert len(load_comparisons(tmp_path, "evaluation")) == 1


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    write_beavertails_v([pair(n) for n in range(3)], tmp_path, "train")
    gone = Picture.from_path(tmp_path / "gone.png")
    broken = pair(prompt=Prompt(text="q", images=(gone,), category="animal_abuse"))
    with pytest.raises(ValueError, match="gone.png"):
        write_beavertails_v([pair(9), broken], tmp_path, "train", overwrite=True)
    assert [p.prompt.text for p in load_comparisons(tmp_path)] == ["q 0", "q 1", "q 2"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt(text="q"), "comparison 1: has 0 pictures"),
        (Prompt(text="q", images=pair().prompt.images * 2), "comparison 1: has 2 pictures"),
        (Prompt(text="q", images=pair().prompt.images, category="animal"), "nearest is 'animal_abuse'"),
        (Prompt(text="q", images=pair().prompt.images, meta={"x": "a"}), "meta key 'x'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, prompt: Prompt, says: str) -> None:
    first = pair(prompt=Prompt(text="q", images=pair().prompt.images, meta={"x": 1}))
    with pytest.raises(ExportError, match=says):
        write_beavertails_v([first, pair(prompt=prompt)], tmp_path, "train")
    assert not list(tmp_path.rglob("*.parquet"))
