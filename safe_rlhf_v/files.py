"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place once all is written; its folder is made.

    A reader sees the old file or the new one, never half of it, after a power cut too. Where writing fails the old one
    stays. One writer at a time: the path beside is always the same. A link stays a link: the file it names is replaced.
    What is no regular file, as /dev/stdout or a pipe, is written straight into.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    beside = path.with_name(path.name + ".tmp")
    yield beside
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character pair
