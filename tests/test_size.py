"""The code stays small: limits on functions, files and the command line, and on who is handed all settings."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("beavertails_v", "safe_rlhf_v", "guard") for path in (ROOT / package).rglob("*.py")]
FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MOST = 8, 22, 60
FILE_P90, FILE_MOST = 260, 400
CLI_LINES = 1_000
WITH_SETTINGS = 25
"""Functions that are handed the whole `Settings`; all others take what they use."""
MAY_HAVE_SETTINGS = {"stages", "comparison", "planning", "demo", "cli"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def lines_of(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def takes_settings(function: Function) -> bool:
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    written = {ast.unparse(a.annotation).strip("\"'") for a in arguments if a.annotation}
    return bool(written & {"Settings", "Settings | None"})


def p90(values: list[int]) -> int:
    return sorted(values)[int(0.9 * len(values))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    package, inside = path.relative_to(ROOT).parts[:2]
    return inside if package == "safe_rlhf_v" else package


SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}


def test_functions_are_short() -> None:
    found = {(name_of(p), f.name, f.lineno): lines_of(f) for p, source in SOURCES.items() for f in functions(source)}
    lengths = list(found.values())
    assert [place for place, length in found.items() if length > FUNCTION_MOST] == []
    assert statistics.median(lengths) <= FUNCTION_MEDIAN and p90(lengths) <= FUNCTION_P90


def test_files_are_short() -> None:
    lengths = {name_of(path): len(source.splitlines()) for path, source in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > FILE_MOST} == {}
    assert p90(list(lengths.values())) <= FILE_P90


def test_the_command_line_holds_commands_alone() -> None:
    lines = {name_of(p): len(source.splitlines()) for p, source in SOURCES.items() if room(p) == "cli"}
    assert sum(lines.values()) < CLI_LINES, lines


def test_functions_take_what_they_use_and_not_all_settings() -> None:
    found = [
        (room(p), name_of(p), f.name) for p, source in SOURCES.items() for f in functions(source) if takes_settings(f)
    ]
    assert len(found) <= WITH_SETTINGS, found
    assert [place for place in found if place[0] not in MAY_HAVE_SETTINGS] == []


def test_the_checks_can_fail() -> None:
    source = "def f(a, *, s: 'Settings | None' = None):\n    def g(s: TrainSettings):\n        pass\n    return 1\n"
    assert [(f.name, lines_of(f), takes_settings(f)) for f in functions(source)] == [("f", 4, True), ("g", 2, False)]
    assert p90(list(range(1, 11))) == 10 and room(ROOT / "guard" / "x.py") == "guard"
