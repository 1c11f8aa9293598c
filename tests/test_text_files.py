"""Every text file is UTF-8, whatever the machine's locale; and what users wrote is never read as rich's markup."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p for top in ("beavertails_v", "safe_rlhf_v", "guard", "examples", "benchmarks") for p in (ROOT / top).rglob("*.py")
)
NOT_TEXT = {"Image", "gzip", "os", "tarfile", "zipfile", "files", "archive"}  # their open() is another


def calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text as the locale says."""
    found = []
    for call in calls(source):
        name, keywords = name_of(call), {k.arg: k.value for k in call.keywords}
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if "encoding" in keywords or owner in NOT_TEXT:
            continue
        places = {"open": 0 if isinstance(call.func, ast.Attribute) else 1, "fdopen": 1, "NamedTemporaryFile": 0}
        if name in places:
            given = call.args[places[name] : places[name] + 1]
            mode = given[0] if given else keywords.get("mode", ast.Constant("w+b" if name[0] == "N" else "r"))
            text = not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        else:
            text = name == "write_text" or (name == "read_text" and not call.args)
            text = text or (name in ("run", "Popen", "check_output") and "text" in keywords)
        if text:
            found.append(call.lineno)
    return found


def unescaped(source: str) -> list[int]:
    """Lines that hand rich a text with values in it, as markup."""
    found = []
    for call in calls(source):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        console = getattr(owner, "attr", getattr(owner, "id", "")) in ("console", "errors")
        if not console or name_of(call) not in ("print", "rule", "log"):
            continue
        if any(k.arg == "markup" and getattr(k.value, "value", True) is False for k in call.keywords):
            continue
        texts = [arg for arg in call.args if not (isinstance(arg, ast.Call) and name_of(arg) in ("Text", "assemble"))]
        values = [v for text in texts for v in ast.walk(text) if isinstance(v, ast.FormattedValue)]
        if any(not (isinstance(v.value, ast.Call) and name_of(v.value) in ("escape", "len")) for v in values):
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_utf8_and_never_markup(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert without_encoding(source) == [], "give encoding='utf-8'"
    assert unescaped(source) == [], "use cli.common.plain, markup=False or rich.markup.escape"


def test_what_the_tests_above_find() -> None:
    bad = [
        "open(p)",
        "p.open('a')",
        "p.write_text(x)",
        "p.read_text()",
        "open(p, 'w', newline='')",
        "run(c, text=True)",
    ]
    good = [
        "open(p, 'rb')",
        "p.open('ab')",
        "p.write_text(x, encoding='utf-8')",
        "Image.open(p)",
        "run(c)",
        "p.open(mode='wb')",
    ]
    assert [x for x in bad + good if without_encoding(x)] == bad
    bad = ["console.print(f'written: {path}')", "self.console.rule(f'{x}')"]
    good = ["console.print(f'{x}', markup=False)", "console.print(f'[bold]{escape(x)}[/]')", "print(f'{x}')"]
    assert [x for x in bad + good if unescaped(x)] == bad
