"""Which family was tested for what: passing tests fill the cells of the table in docs/models.md.

A test marked `@pytest.mark.capability("SFT")` with a parameter `family` is one column; where it passes, the cell of
that family says "yes", or what the test gave to the fixture `cell`. One test a column, so a cell is never half tested.
tests/conftest.py compares what ran with the committed table, and writes it with `pytest --update-models-table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from more_families import ALL

Cells = Mapping[tuple[str, str], str]
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- tested: written by the tests -->\n", "<!-- end -->"
TITLES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "gemma3": "Gemma 3",
    "internvl": "InternVL3",
    "idefics3": "Idefics3, SmolVLM",
    "smolvlm": "SmolVLM2",
    "pixtral": "Pixtral",
    "mllama": "Llama 3.2 Vision",
}
CAPABILITIES = (
    "batch = rows", "padding", "collation", "features once", "generation = forward", "SFT", "reward", "cost", "guard",
    "PPO-Lag", "no critics", "one backbone = six", "plain PEFT", "export", "4-bit",
)  # fmt: skip


def render(cells: Cells) -> str:
    """The table, a family a row, with empty cells where nothing was tested."""
    head = ["family", *CAPABILITIES]
    rows = [[title, *(cells.get((family, c), "") for c in CAPABILITIES)] for family, title in TITLES.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def parse(page: str) -> dict[tuple[str, str], str]:
    """The filled cells of the page's table."""
    lines = page.split(BEGIN)[1].split(END)[0].splitlines()
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    families = {title: family for family, title in TITLES.items()}
    return {
        (families[row[0]], name): text
        for row in rows[2:]
        for name, text in zip(rows[0][1:], row[1:], strict=True)
        if text and row[0] in families
    }


def updated(cells: Cells, ran: Mapping[tuple[str, str], str | None]) -> dict[tuple[str, str], str]:
    """The cells after a session. ran: what passing tests say, None for one that failed; cells that did not run stay."""
    after = {**cells, **ran}
    return {cell: text for cell, text in after.items() if text and cell[0] in TITLES and cell[1] in CAPABILITIES}


def rewritten(page: str, cells: Cells) -> str:
    """The page with the table of `cells`."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + render(cells) + END + rest.split(END, 1)[1]


def stale(page: str, ran: Mapping[tuple[str, str], str | None]) -> list[str]:
    """What the page says otherwise than the tests that ran."""
    committed = parse(page)
    return [
        f"{TITLES[family]}, {name}: the page says {committed.get((family, name))!r}, the test {text!r}"
        for (family, name), text in ran.items()
        if committed.get((family, name)) != text
    ]


assert TITLES.keys() == ALL.keys()
