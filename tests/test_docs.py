"""The docs are true: links lead somewhere, code compiles, settings load; commands, options, files and tests exist."""

import re
from pathlib import Path

import pytest
from markdown_pages import (
    ROOT,
    anchors,
    exists,
    is_setting,
    joined_lines,
    load_block,
    names,
    page,
    wrong_command,
    wrong_lines,
    wrong_tests,
)

from safe_rlhf_v.config import SettingsError

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "examples").rglob("*.md"))]
BLOCKS = [(p, line, language, text) for p in PAGES for line, language, text in page(p).blocks]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_names_only_what_is_there(path: Path) -> None:
    assert [*wrong_lines(path), *wrong_tests(path)] == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_lists_and_tables_stand_apart(path: Path) -> None:
    assert list(joined_lines(path)) == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_a_page_begins_with_what_it_is_for(path: Path) -> None:
    title, blank, first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ") and not blank and re.match(r"[`\w]", first)


@pytest.mark.parametrize(("path", "line", "text"), [(p, n, t) for p, n, language, t in BLOCKS if language == "yaml"])
def test_yaml_blocks_load(path: Path, line: int, text: str, tmp_path: Path) -> None:
    load_block(text, tmp_path)


@pytest.mark.parametrize(("path", "line", "text"), [(p, n, t) for p, n, language, t in BLOCKS if language == "python"])
def test_python_blocks_compile_and_import_what_is_there(path: Path, line: int, text: str) -> None:
    assert [name for name in names(text) if not exists(name)] == []


def test_the_site_has_every_page_and_documents_what_is_there() -> None:
    nav = re.findall(r": (\S+\.md)$", (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(nav) == sorted(map(name_of, [*PAGES, ROOT / "CHANGELOG.md"]))
    documented = re.findall(r"^::: (\S+)", "".join(p.read_text(encoding="utf-8") for p in DOCS), re.MULTILINE)
    assert documented and [name for name in documented if not exists(name)] == []


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    text = """# A page
Some words:
- [gone](gone.md), [no heading](#nowhere), [right](#a-page)
- `policy.betta`, `make supper`, `tests/test_gone.py`, `test_losses.py::test_gone`, `safe-rlhf-v train nothing`
```bash
safe-rlhf-v train sft --confg run.yaml   # an option that is not there; and a remark's quote
for stage in reward cost; do safe-rlhf-v train $stage reward.lerning_rate=1; done
```
"""
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    wrong = " | ".join([*wrong_lines(path), *wrong_tests(path)])
    for word in ("gone.md", "#nowhere", "policy.betta", "make supper", "tests/test_gone.py", "::test_gone"):
        assert word in wrong
    assert "train nothing" in wrong and "--confg" in wrong and "#a-page" not in wrong
    assert list(joined_lines(path)) == [3]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("train sft --config run.yaml sft.lerning_rate=1", "lerning_rate"),
        ("guard check", ""),
        ("generate runs/x --imag photo.png", "--imag"),
        ("train nothing", "nothing"),
    ],
)
def test_commands_are_read_and_not_run(line: str, word: str) -> None:
    why = wrong_command(line)
    assert word in (why or "") and bool(why) == bool(word)


def test_anchors_are_githubs() -> None:
    text = "# One\n## `doctor`: before, and after\n## One\n"
    assert list(anchors(text)) == ["one", "doctor-before-and-after", "one-1"]
    assert is_setting("policy.beta") and is_setting("policy.dual") and not is_setting("policy.betta")


def test_yaml_blocks_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lerning_rate"):
        load_block("sft: {lerning_rate: 1}\n", tmp_path)
    with pytest.raises(Exception, match="rules"):
        load_block("refusal: no\nquery: {ruls: {}}\n", tmp_path)
