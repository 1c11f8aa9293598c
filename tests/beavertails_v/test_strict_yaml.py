"""YAML is read as it is written."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from beavertails_v.strict_yaml import Scalar, YamlError, load_yaml, read_yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5e3),
        ("-.5", -0.5),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-06-01", "2024-06-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("=", "="),
        ("True", True),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("[1, no, 3-4]", [1, "no", "3-4"]),
        ("9" * 500, float("inf")),
    ],
)
def test_scalars_by_the_core_schema(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_numbers_keep_how_they_were_written() -> None:
    found = load_yaml("a: 1e3\n7: [012, true, '5', null, 2024-06-01]", as_written=True)
    assert found == {
        "a": Scalar("1e3", 1000.0),
        "7": [Scalar("012", 12), Scalar("true", True), "5", None, "2024-06-01"],
    }


def test_merge_keys_give_what_the_mapping_itself_does_not() -> None:
    text = "base: &b {lr: 1, steps: 2}\nmore: &m {seed: 3}\none: {<<: *b, lr: 9}\ntwo: {<<: [*b, *m], lr: 8}"
    found = load_yaml(text)
    assert found["one"] == {"lr": 9, "steps": 2}
    assert found["two"] == {"lr": 8, "steps": 2, "seed": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice"),
        ("s:\n  x: 1\n  'x': 2", "line 3, column 3: the key 'x' stands twice"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a", "the key '<<' stands twice"),
        ("[1, 2]: 3", "line 1, column 1: a key must be a word"),
        ("a: [", "line 1"),
        ("a: {b: !!python/name:os.system x}", "line 1, column 8"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: *nothing", "nothing"),
        ("a: b\x07", "special characters are not allowed"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_errors_are_one_line_and_name_the_place(text: str, words: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_yaml(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("name: Käse".encode("latin-1"))
    with pytest.raises(YamlError, match="UTF-8"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes("name: Käse".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "b.yaml") == {"name": "Käse"}


@pytest.mark.parametrize(
    "path",
    sorted(p for top in ("beavertails_v", "safe_rlhf_v", "guard") for p in (ROOT / top).rglob("*.yaml")),
    ids=str,
)
def test_shipped_files_mean_the_same_to_other_readers(path: Path) -> None:
    """Who reads them with PyYAML gets nothing else; numbers such as 1e-4 apart, which it takes for text."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [numbers(inner) for inner in value]
        return float(value) if isinstance(value, str) and value.replace("e-", "").replace(".", "").isdigit() else value

    assert numbers(read_yaml(path)) == numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
