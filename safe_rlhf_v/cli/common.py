"""What the commands share: options, and what they print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safe_rlhf_v.cli.boundary import is_user_error, user_errors

if TYPE_CHECKING:
    from safe_rlhf_v.config import Settings

__all__ = ["Config", "Overrides", "console", "is_user_error", "plain", "settings_of", "show", "user_errors"]

console = Console(emoji=False)  # :fire: in a path or an answer is no picture

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML settings; without it every setting has its default.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings on top of the file: section.key=value ...", show_default=False)
]


def settings_of(config: Path | None, overrides: list[str] | None, section: str = "") -> Settings:
    """The settings of a command line. section: that of the command, where an unknown key is looked for first."""
    from safe_rlhf_v.config import load_settings

    return load_settings(config, overrides or [], section=section)


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
