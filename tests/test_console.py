"""Commands show what libraries log; a program that imports them sees what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from safe_rlhf_v.console import Lines, show_logs

PACKAGES = ("beavertails_v", "safe_rlhf_v", "guard")


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.handlers = [h for h in logger.handlers if not isinstance(h, Lines)]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


def test_progress_goes_to_stdout_and_warnings_to_stderr_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    show_logs()  # a group of commands within another
    log = logging.getLogger("safe_rlhf_v.training.records")
    log.info("sft step 8 of 12: loss 0.31  02:05 left [red] :fire:")
    log.warning("%d rows left out", 3)
    out, err = capsys.readouterr()
    assert out == "sft step 8 of 12: loss 0.31  02:05 left [red] :fire:\n" and err == "3 rows left out\n"


def test_a_library_alone_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("guard.train").info("step 1 of 2")
    assert capsys.readouterr() == ("", "")
