"""Shared by all tests: quiet libraries, no network, one thread; the table of tested model families."""

import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")

RAN: dict[tuple[str, str], str | None] = {}  # (family, capability) to what its cell says, None where the test failed


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "Write what the tests of this session found to the table in docs/models.md; other cells stay as they are."
    parser.addoption("--update-models-table", action="store_true", help=text)
    text = "Add N to every seed that tests set: what they assert must hold for any draw."
    parser.addoption("--shift-seeds", type=int, default=0, metavar="N", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(name): a column of the table in docs/models.md")
    if by := config.getoption("--shift-seeds"):
        from shifted_seeds import shift_seeds

        shift_seeds(by)
        os.environ["SHIFT_SEEDS"] = str(by)  # for shifted_forks


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """cell("afresh"): what the table says of this family and capability in place of "yes"."""
    return lambda text: request.node.user_properties.append(("cell text", text))


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("capability")
    if mark is not None:
        item.user_properties.append(("cell", [item.callspec.params["family"], mark.args[0]]))  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Runs in the process that reports, so it hears of the tests of every worker."""
    said = dict(report.user_properties)
    if "cell" in said and (report.failed or (report.when == "call" and report.passed)):
        RAN[tuple(said["cell"])] = None if report.failed else str(said.get("cell text", "yes"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not RAN:
        return
    import models_table

    page = models_table.PAGE.read_text()
    if session.config.getoption("--update-models-table"):
        cells = models_table.updated(models_table.parse(page), RAN)
        models_table.PAGE.write_text(models_table.rewritten(page, cells))
    elif models_table.stale(page, RAN) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not RAN or config.getoption("--update-models-table"):
        return
    import models_table

    if wrong := models_table.stale(models_table.PAGE.read_text(), RAN):
        terminalreporter.section("docs/models.md differs from what the tests found: run pytest --update-models-table")
        for line in wrong:
            terminalreporter.line(line)
