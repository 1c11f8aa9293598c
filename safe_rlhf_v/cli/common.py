"""What the commands share: options, and how settings are read from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safe_rlhf_v.console import console, plain, show

if TYPE_CHECKING:
    from safe_rlhf_v.config import Settings

__all__ = ["Config", "Overrides", "console", "plain", "settings_of", "show"]

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
