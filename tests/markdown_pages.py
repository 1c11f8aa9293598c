"""What a page of the docs names, and whether it is there."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from beavertails_v.sources import ColumnMap
from guard import Policy
from guard.server.settings import ServeSettings
from safe_rlhf_v.cli import app
from safe_rlhf_v.comparison.settings import CompareSettings, load_compare
from safe_rlhf_v.config import Settings, SettingsError, load_settings

ROOT = Path(__file__).parents[1]
COMMAND = typer.main.get_command(app)
USAGE_ERROR = typer.BadParameter.__mro__[1]  # of the click that typer carries: its other errors are no public names
CALL = re.compile(r"(?:.*\s)?(?:\.venv/bin/)?safe-rlhf-v (.*)|accelerate launch .*-m safe_rlhf_v\.cli (.*)")
SETTING = re.compile(rf"(?:{'|'.join(Settings.model_fields)})\.[a-z_]+(?:\.[a-z_]+)*(?=$|=)")
NOT_SETTINGS = re.compile(
    r"model\.generate|data\.label|guard\.(?:\w+\.\w+|Guard)|.*\.(?:html|json|yaml|jsonl)"
)  # code and files
FILE = re.compile(
    r"(?:beavertails_v|safe_rlhf_v|guard|tests|configs|docs|benchmarks|examples)/[\w./-]*\.(?:py|yaml|md)\b"
)
TEST = re.compile(r"([\w/]+\.py)?::(test_\w+)")
MAKE = re.compile(r"^make ([a-z-]+)", re.MULTILINE)
STARTS = re.compile(r"- |\d+\. |\|")
MAY_PRECEDE = re.compile(r"#+ |- |\d+\. |\||  |<!--")


@dataclass
class Page:
    """What of a page can be wrong: (line, text) each."""

    links: list[tuple[int, str]] = field(default_factory=list)
    code: list[tuple[int, str]] = field(default_factory=list)
    blocks: list[tuple[int, str, str]] = field(default_factory=list)  # line, language, text
    anchors: set[str] = field(default_factory=set)


@cache
def page(path: Path) -> Page:
    found = Page()
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            found.blocks.append((line, token.info.strip(), token.content))
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                found.links.append((line, str(child.attrs["href" if child.type == "link_open" else "src"])))
            elif child.type == "code_inline":
                found.code.append((line, child.content))
    found.anchors = set(anchors(path.read_text(encoding="utf-8")))
    return found


def anchors(text: str) -> Iterator[str]:
    """GitHub's: in small letters, without punctuation, blanks as hyphens; a second one of a name ends in -1."""
    seen: dict[str, int] = {}
    tokens = MarkdownIt("commonmark").parse(text)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            name = re.sub(r"[^\w\- ]", "", shown(inline).lower()).replace(" ", "-")
            seen[name] = seen.get(name, -1) + 1
            yield f"{name}-{seen[name]}" if seen[name] else name


def shown(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def broken_link(path: Path, link: str) -> str | None:
    """Why a relative link leads nowhere; None where it leads somewhere, or out of the repository."""
    if re.match(r"[a-z]+:", link):
        return None
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists():
        return f"{link}: no such file"
    if anchor and anchor not in page(target).anchors:
        return f"{link}: no such heading"
    return None


def is_target(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) is not None


def is_file(name: str) -> bool:
    """Tables of tests leave `tests/` out."""
    return (ROOT / name).exists() or (ROOT / "tests" / name).exists()


def is_test(file: str, name: str) -> bool:
    path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / file
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


def is_setting(name: str) -> bool:
    """Whether a setting or section of this dotted name exists, whatever values it takes."""
    try:
        load_settings(None, [f"{name}=null"])
    except SettingsError as error:
        return "unknown key" not in str(error)
    return True


def commands(text: str) -> Iterator[str]:
    """Lines of a shell block that call the command, those continued by a backslash in one piece."""
    text = re.sub(r"(?m)(?:^|\s)#.*$", "", text.replace("\\\n", " "))
    if loop := re.search(r"for (\w+) in (\w+)", text):
        text = text.replace(f"${loop[1]}", loop[2])
    for line in text.splitlines():
        for part in re.split(r";|\||&&", line):
            if call := CALL.match(part.strip()):
                yield call[1] or call[2]


def wrong_command(line: str) -> str | None:
    """Why `safe-rlhf-v LINE` would be refused for its words; nothing is run, no file looked for."""
    words, command, context = shlex.split(line), COMMAND, typer.Context(COMMAND, info_name="safe-rlhf-v")
    try:
        while hasattr(command, "commands"):
            words = [word for word in words if word != "--debug"]
            if not words or words[0].startswith(("-", "...")):
                return None
            name, command, words = command.resolve_command(context, words)
            context = typer.Context(command, info_name=name, parent=context)
        given, _, _ = command.make_parser(context).parse_args(list(words))
    except USAGE_ERROR as error:
        return error.format_message()
    overrides = [x for x in given.get("overrides") or () if "..." not in x]
    return None if "compare" in context.command_path else wrong_settings(overrides)


def wrong_settings(overrides: list[str]) -> str | None:
    try:
        load_settings(None, overrides)
    except SettingsError as error:
        return str(error)
    return None


def load_block(text: str, folder: Path) -> None:
    """Loads a YAML block as what its keys say it is: settings, a comparison, a policy, a server's or a column map."""
    keys, file = set(yaml.safe_load(text)), folder / "block.yaml"
    file.write_text(text, encoding="utf-8")
    if keys <= set(Settings.model_fields):
        load_settings(file)
    elif keys <= set(CompareSettings.model_fields):
        load_compare(file)
    elif "refusal" in keys:
        Policy.load(file)
    elif "batch_wait_ms" in keys:
        assert ServeSettings.load(file) == ServeSettings(), "the page shows the defaults"
    else:
        ColumnMap.load(file)


def names(text: str) -> Iterator[str]:
    """Dotted names that a Python block imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def exists(name: str) -> bool:
    """Whether a module, or what stands in one, has this dotted name."""
    module, _, attribute = name.rpartition(".")
    try:
        return bool(importlib.import_module(name))
    except ModuleNotFoundError:
        return bool(module) and exists(module) and hasattr(importlib.import_module(module), attribute)


def wrong_lines(path: Path) -> Iterator[str]:
    """Everything in a page that names what is not there, each with its line."""
    found = page(path)
    for line, link in found.links:
        if why := broken_link(path, link):
            yield f"{line}: {why}"
    shell = [(line, text) for line, language, text in found.blocks if language in ("", "bash", "sh")]
    quoted = [(line, text) for line, text in found.code if text.startswith("safe-rlhf-v ")]
    for line, text in [*shell, *quoted]:
        yield from (f"{line}: safe-rlhf-v {call}: {why}" for call in commands(text) if (why := wrong_command(call)))
    for line, text in [*shell, *found.code]:
        yield from (f"{line}: make {m}: no such target" for m in MAKE.findall(text) if not is_target(m))
    for line, text in [*shell, *found.code, *((n, t) for n, _, t in found.blocks)]:
        yield from (f"{line}: {name}: no such file" for name in FILE.findall(text) if not is_file(name))
    for line, text in found.code:
        if (setting := SETTING.match(text)) and not NOT_SETTINGS.fullmatch(setting[0]) and not is_setting(setting[0]):
            yield f"{line}: {setting[0]}: no such setting"


def wrong_tests(path: Path) -> Iterator[str]:
    """Tests named as `file.py::test_name`, or as `::test_name` after a file's name, that are not there."""
    file = ""
    for line, text in page(path).code:
        if re.fullmatch(r"(?:\w+/)*test_\w+\.py", text):
            file = text
        elif test := TEST.fullmatch(text):
            file = test[1] or file
            if not is_test(file, test[2]):
                yield f"{line}: {file}::{test[2]}: no such test"


def joined_lines(path: Path) -> Iterator[int]:
    """Lines where a list or table follows a paragraph without a blank line: only some readers of Markdown see it."""
    before, fenced = "", False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and STARTS.match(line) and before.strip() and not MAY_PRECEDE.match(before):
            yield number
        before = line
