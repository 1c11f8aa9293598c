"""Files as they come from outside, made with pyarrow and Pillow alone and not by the code under test."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(colour: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def official_row(n: int = 0, **changes: Any) -> dict[str, Any]:
    """A faultless row of the dual-preference release; response 2 is more helpful, response 1 safer."""
    return {
        "question": f"question {n}",
        "image": {"bytes": png(n), "path": None},
        "category": "animal_abuse",
        "image_severity": 1,
        "response_1": "no, because",
        "response_2": "first, then",
        "response_1_from": "model a",
        "response_2_from": "model b",
        "more_helpful_response_id": "2",
        "is_response_1_safe": "yes",
        "is_response_2_safe": "no",
        "safer_response_id": "1",
        "response_1_harmless_rate": 2,
        "response_2_harmless_rate": -2,
        "response_1_helpful_rate": 0,
        "response_2_helpful_rate": 3,
    } | changes


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
