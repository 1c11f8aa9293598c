"""Small files of rows, for the tests of loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import png, write_jsonl, write_parquet


@pytest.fixture
def one_file(tmp_path: Path) -> Callable[..., Path]:
    """one_file(row, row, ...) -> a parquet file of these rows."""
    return lambda *rows: write_parquet(tmp_path / "rows.parquet", rows)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """jsonl(row, row, ...) -> a jsonl file of these rows, with pictures/0.png beside it."""

    def make(*rows: dict[str, Any]) -> Path:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / "0.png").write_bytes(png(0))
        return write_jsonl(tmp_path / "pairs.jsonl", rows)

    return make
