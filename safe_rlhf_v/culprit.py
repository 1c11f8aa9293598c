"""Which file an error is about that a library raised without naming it: the one that the failing call held."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Error class to the suffixes of the files that can raise it; of others any file can.
SUFFIXES = {
    "JSONDecodeError": (".json", ".jsonl", ".lock"),
    "SafetensorError": WEIGHTS,
    "UnpicklingError": WEIGHTS,
    "ArrowException": (".parquet", ".arrow"),
}
PARTS = (sys.prefix, sys.base_prefix, str(Path(__file__).parent))  # of the program, not the user's
CODE = (".py", ".pyc", ".so", ".jinja2")


def culprit(error: BaseException) -> str | None:
    """The file in the innermost call that holds one, or the folder of the model whose template failed; or None."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    wanted = next((suffixes for name, suffixes in SUFFIXES.items() if name in kinds), ("",))
    for values in _calls(error):
        found = {path for path in map(_path, values) if path and path.endswith(wanted) and os.path.isfile(path)}
        if len(found) == 1:
            return found.pop()
        if "TemplateError" in kinds and (folders := set(_folders(values))):
            return folders.pop()
    return None


def _calls(error: BaseException) -> Iterator[list[Any]]:
    """The local values of each call, the innermost first."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        yield list(frame.f_locals.values())


def _path(value: Any) -> str | None:
    """A path as text, of a path, a text or an open file; None of a file of the program itself."""
    value = getattr(value, "name", None) if hasattr(value, "read") and not isinstance(value, Path) else value
    text = os.fspath(value) if isinstance(value, Path | str) else ""
    if not text or len(text) > 4000 or "\0" in text or "\n" in text or text.endswith(CODE):
        return None
    return None if os.path.abspath(text).startswith(PARTS) else text


def _folders(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        name = getattr(value, "name_or_path", None) or getattr(getattr(value, "tokenizer", None), "name_or_path", None)
        if isinstance(name, str) and name:
            yield name
