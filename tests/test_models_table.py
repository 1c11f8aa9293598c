"""The table in docs/models.md says what the tests of this suite can say, and no partial run adds to it."""

from __future__ import annotations

import models_table
from models_table import BEGIN, CAPABILITIES, END, TITLES, parse, render, rewritten, stale, updated

PAGE = f"before\n{BEGIN}{{}}{END}\nafter\n"


def test_the_committed_table_is_whole_and_as_the_tests_write_it() -> None:
    page = models_table.PAGE.read_text()
    cells = parse(page)
    assert cells.keys() == {(family, name) for family in TITLES for name in CAPABILITIES}
    assert rewritten(page, cells) == page


def test_what_is_written_is_read_again() -> None:
    cells = {("llava", "SFT"): "yes", ("mllama", "features once"): "afresh"}
    page = PAGE.format(render(cells))
    assert parse(page) == cells
    assert rewritten(PAGE.format(""), cells) == page


def test_a_session_changes_the_cells_that_it_ran_and_no_others() -> None:
    before = {("llava", "SFT"): "yes", ("llava", "guard"): "yes", ("gemma3", "SFT"): "yes"}
    ran = {("llava", "SFT"): "yes", ("gemma3", "SFT"): None, ("pixtral", "SFT"): "yes", ("unknown", "SFT"): "yes"}
    after = updated(before, ran)
    assert after == {("llava", "SFT"): "yes", ("llava", "guard"): "yes", ("pixtral", "SFT"): "yes"}


def test_a_page_that_says_other_than_the_tests_is_stale() -> None:
    page = PAGE.format(render({("llava", "SFT"): "yes", ("llava", "guard"): "yes", ("gemma3", "SFT"): "yes"}))
    assert stale(page, {("llava", "SFT"): "yes"}) == []
    claimed, missing = stale(page, {("gemma3", "SFT"): None, ("pixtral", "SFT"): "yes"})
    assert claimed.startswith("Gemma 3, SFT: the page says 'yes', the test None")
    assert missing.startswith("Pixtral, SFT: the page says None, the test 'yes'")
