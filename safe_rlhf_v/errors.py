"""Where errors become sentences and exit codes.

Exit codes: 0 done; 1 a verdict (a question is flagged, a check or a run failed); 2 a mistake in what was given, in one
sentence; 70 a fault of this project, with its traceback; 130 stopped by Ctrl-C; 141 nobody reads the output any more.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from safe_rlhf_v.culprit import culprit

P = ParamSpec("P")
R = TypeVar("R")
USAGE, CRASH, STOPPED, UNREAD = 2, 70, 130, 141
PLACES = ("image", "source", "model", "student", "teacher", "model_config")  # a path, an address or a hub id
TEXTS = ("prompt", "text", "response")

# Errors that libraries raise over a file of the user: module, class, and the sentence before what they say.
OF_FILES = {
    ("builtins", "UnicodeDecodeError"): "a file is not UTF-8 text",
    ("builtins", "UnicodeEncodeError"): "a text cannot be written as UTF-8",
    ("builtins", "FloatingPointError"): "",
    ("builtins", "EOFError"): "a file ends too early",
    ("builtins", "MemoryError"): "out of memory",
    ("json", "JSONDecodeError"): "a file is not JSON, or was cut short",
    ("yaml", "YAMLError"): "a file is not YAML",
    ("jinja2", "TemplateError"): "the model's chat template does not work",
    ("safetensors", "SafetensorError"): "a file of weights is damaged or was cut short",
    ("safetensors_rust", "SafetensorError"): "a file of weights is damaged or was cut short",
    ("zipfile", "BadZipFile"): "a file is damaged or was cut short",
    ("pickle", "UnpicklingError"): "a file of weights is damaged",
    ("_pickle", "UnpicklingError"): "a file of weights is damaged",
    ("pyarrow", "ArrowException"): "a table cannot be read or written",
    ("huggingface_hub", "HFValidationError"): "not a folder here, and not a hub id",
    ("torch", "OutOfMemoryError"): "",
}  # fmt: skip


def is_user_error(error: BaseException) -> bool:
    """Errors whose message says what to do: those this project defines, unreadable files, missing packages."""
    return _is_ours(error) or isinstance(error, OSError | ImportError) or _of_a_file(error) is not None


def _is_ours(error: BaseException) -> bool:
    from beavertails_v.errors import UserError  # when there is an error: --help need not wait for the package

    return isinstance(error, UserError)


def _of_a_file(error: BaseException) -> str | None:
    names = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__)
    return next((OF_FILES[name] for name in names if name in OF_FILES), None)


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Make a command say a user's error in one sentence, and end with the exit codes above.

    `safe-rlhf-v --debug ...` shows the traceback of every error. Paths that begin with ~ are those of the home folder.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = {name: _given(name, value) for name, value in kwargs.items()}
            return command(*args, **given)  # type: ignore[arg-type]
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("stopped", ": a stage that is run again goes on from its newest checkpoint")
            raise typer.Exit(STOPPED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails again
            raise typer.Exit(UNREAD) from None
        except Exception as error:
            end(error)

    return wrapped


def end(error: Exception) -> NoReturn:
    """Print the error and raise the Exit that belongs to it."""
    known = is_user_error(error)
    if os.environ.get("SAFE_RLHF_V_DEBUG") or not known:
        traceback.print_exception(error)
    if not known:
        say("fault", " of safe-rlhf-v, not of what you gave: please report it with the lines above")
        raise typer.Exit(CRASH) from None
    say("error:", f" {message_of(error)}", style="bold red")
    raise typer.Exit(USAGE) from None


def say(word: str, rest: str, style: str = "bold") -> None:
    """To stderr; the rest as it is."""
    console = Console(stderr=True, emoji=False)
    console.print(Text.assemble((word, style), rest), soft_wrap=True, highlight=False)


def message_of(error: BaseException) -> str:
    """One sentence: an error of the operating system as `file: what`, one of a library with what it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    said = str(error).strip()
    if (about := _of_a_file(error)) is None or _is_ours(error):
        return said
    one, file = " ".join(said.split())[:300], culprit(error)
    named = file if file and file not in said else ""
    return ": ".join(part for part in (named, about, one) if part) + " (--debug shows where)"


def _given(name: str, value: Any) -> Any:
    """A value of the command line. Raises UserError for a text that is not UTF-8."""
    if isinstance(value, list):
        return [_given(name, item) for item in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if not isinstance(value, str):
        return value
    return _utf8(name, os.path.expanduser(value) if name in PLACES else value)


def _utf8(name: str, value: str) -> str:
    """Where the locale is not UTF-8, bytes come as half pairs: a text is read from them, a path is left as it is."""
    try:
        value.encode("utf-8")
        return value
    except UnicodeEncodeError:
        pass
    try:
        text = os.fsencode(value).decode("utf-8")
    except UnicodeError:
        shown = value.encode("ascii", "backslashreplace").decode()
        from beavertails_v.errors import UserError

        raise UserError(f"the {name.rstrip('_')} is not UTF-8 text: {shown[:60]}") from None
    return text if name in TEXTS else value
