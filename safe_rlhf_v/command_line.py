"""How a command line is read, beyond what typer does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from safe_rlhf_v.console import no_bars_in_logs, show_all_text, show_logs
from safe_rlhf_v.errors import user_errors


class App(typer.Typer):
    """A typer application whose output no encoding can end and no bar can litter, whose options stand once each, and
    whose commands say a user's error in one sentence.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Once, **settings)

    def command(self, *args: Any, **kwargs: Any) -> Any:
        register = super().command(*args, **kwargs)
        return lambda work: register(user_errors(work))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        show_all_text()
        no_bars_in_logs()
        return super().__call__(*args, **kwargs)


class Once(TyperGroup):
    """A second `--config a.yaml` is an error; click would take the last one without a word."""

    def invoke(self, ctx: Any) -> Any:
        show_logs()
        return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, TyperGroup):
            for option in command.params:
                if getattr(option, "is_flag", True) or option.multiple or getattr(option, "count", False):
                    continue
                if _times(rest, option.opts) > 1:
                    raise typer.BadParameter("given twice; give it once", ctx=ctx, param_hint=option.opts[0])
        return name, command, rest


def _times(args: Sequence[str], names: Sequence[str]) -> int:
    """How often an option stands among the arguments; what stands after it is its value, what follows -- no option."""
    found = 0
    words = iter(args)
    for word in words:
        if word == "--":
            break
        if word in names:
            found += 1
            next(words, None)
        elif any(word.startswith(f"{name}=" if name.startswith("--") else name) for name in names):
            found += not (word.startswith("--") and "=" not in word)
    return found
