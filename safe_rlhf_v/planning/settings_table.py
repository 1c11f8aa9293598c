"""`safe-rlhf-v settings`: every setting, as a table."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from safe_rlhf_v.config import Settings, SettingsError, walk
from safe_rlhf_v.console import console


def print_settings(settings: Settings, search: str = "") -> None:
    """One row a setting; a value that is not the default is bold. Raises SettingsError where nothing is found."""
    table = Table("setting", "value", "meaning", title_justify="left")
    defaults, section = Settings(), ""
    for name, info in walk(Settings):
        if search.lower() not in f"{name} {info.description}".lower():
            continue
        if section and name.partition(".")[0] != section:
            table.add_section()
        section = name.partition(".")[0]
        value, default = _get(settings, name), _get(defaults, name)
        shown = _show(value) if value == default else f"[bold]{_show(value)}[/] (default {_show(default)})"
        table.add_row(name, shown, escape(info.description or ""))
    if not table.row_count:
        raise SettingsError(f"no setting's name or description holds '{search}'")
    console.print(table)


def _get(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def _show(value: Any) -> str:
    """As one writes it in YAML. Not by a table of values: 1 and True are one key."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return escape(str(value)) or "''"
