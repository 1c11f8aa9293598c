"""What the commands share: options, and errors of users as one line instead of a traceback."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from safe_rlhf_v.config import Settings

P = ParamSpec("P")
R = TypeVar("R")
OURS = ("beavertails_v", "safe_rlhf_v", "guard")
console = Console()
errors = Console(stderr=True)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML settings; without it every setting has its default.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings on top of the file: section.key=value ...", show_default=False)
]


def is_user_error(error: BaseException) -> bool:
    """Errors whose message says what to do: those this project defines, unreadable files, missing packages."""
    if isinstance(error, OSError | ImportError):
        return True
    return isinstance(error, ValueError | RuntimeError) and type(error).__module__.partition(".")[0] in OURS


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print a user's error in red and exit with 2; `safe-rlhf-v --debug ...` shows the traceback instead."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            errors.print("[bold]stopped[/]: a stage that is run again goes on from its newest checkpoint")
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("SAFE_RLHF_V_DEBUG") or not is_user_error(error):
                raise
            errors.print(f"[bold red]error:[/] {escape(_message(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None

    return wrapped


def _message(error: BaseException) -> str:
    """An error of the operating system as `file: what`."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error).strip()


def settings_of(config: Path | None, overrides: list[str] | None) -> Settings:
    """The settings of a command line."""
    from safe_rlhf_v.config import load_settings

    return load_settings(config, overrides or [])


def plain(text: str) -> None:
    """Text of our own or of a model, printed as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(title: str, values: Mapping[str, Any]) -> None:
    """A two-column table; nested mappings become sections, missing values stay away."""
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    for name, value in values.items():
        if isinstance(value, Mapping):
            table.add_section()
            for key, inner in value.items():
                if isinstance(inner, int | float | str):
                    table.add_row(f"{name} {key}".replace("_", " "), _number(inner))
        elif value is not None and not isinstance(value, list | tuple):
            table.add_row(name.replace("_", " "), _number(value))
    console.print(table)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
