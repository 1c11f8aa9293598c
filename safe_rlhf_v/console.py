"""What is said to whoever runs a command: lines and tables on stdout."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(emoji=False)  # :fire: in a path or an answer is no picture
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # transformers follows the first


def show_all_text() -> None:
    """Let stdout and stderr escape what their encoding lacks: a run does not end on the word that reports it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def no_bars_in_logs() -> None:
    """Keep the libraries' progress bars, which they draw on stderr, to terminals: a log would hold all their states.

    They read the environment where they are imported; after that, as in a fork with a log of its own, transformers is
    told. A user's own setting stays.
    """
    if BARS[0] in os.environ or (sys.stderr is not None and sys.stderr.isatty()):
        return
    os.environ.update(dict.fromkeys(BARS, "1"))
    if (loaded := sys.modules.get("transformers.utils.logging")) is not None:
        loaded.disable_progress_bar()


class Lines(logging.Handler):
    """What libraries log, a line each: progress on stdout, warnings and worse on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            plain(self.format(record))
        else:
            print(self.format(record), file=sys.stderr, flush=True)


def show_logs() -> None:
    """Show whoever runs a command what the three packages log; a program that imports them decides for itself."""
    for name in ("beavertails_v", "safe_rlhf_v", "guard"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, Lines) for handler in logger.handlers):
            logger.addHandler(Lines())


def plain(text: str) -> None:
    """Text of our own or of a model, printed as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(title: str, values: Mapping[str, Any]) -> None:
    """A two-column table; nested mappings become sections, missing values stay away."""
    table = Table(title=Text(title), title_justify="left", show_header=False, title_style="bold")
    for name, value in values.items():
        if isinstance(value, Mapping):
            table.add_section()
            for key, inner in value.items():
                if isinstance(inner, int | float | str):
                    table.add_row(_words(f"{name} {key}"), _number(inner))
        elif value is not None and not isinstance(value, list | tuple):
            table.add_row(_words(name), _number(value))
    console.print(table)


def _words(name: str) -> Text:
    return Text(name.replace("_", " "))


def _number(value: Any) -> Text:
    return Text(f"{value:.4g}" if isinstance(value, float) else str(value))
