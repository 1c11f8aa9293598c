"""What stands in the files of a data set or a model, told cheaply: names with hashes, before any row is checked.

A file up to `WHOLE` bytes is hashed in full. Of a larger one, its size and `BLOCKS` blocks spread over it: weights that
were trained differ in each; of data, where one label may have changed, the time of the last change as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safe_rlhf_v.config import DataSection

WHOLE, BLOCKS, BLOCK = 64 * 2**20, 64, 2**16
MODEL = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
# what a stage's folder holds beside its model
RECORDS = {"stage.json", "done.json", "metrics.json", "threshold.json", "suggested_thresholds.json", "iterations.json"}
COLUMNS = "*_columns.safetensors"


def absolute(value: Any) -> Any:
    """A local path from wherever it is asked for; a hub id, and all else, as it is."""
    return str(Path(value).absolute()) if isinstance(value, str) and value and Path(value).exists() else value


def model_files(folder: Path) -> dict[str, str]:
    """Name to hash of the files that make a local model or adapter."""
    found = {file for pattern in MODEL for file in folder.glob(pattern) if not file.match(COLUMNS)}
    return {file.name: file_hash(file) for file in sorted(found) if file.is_file() and file.name not in RECORDS}


def data_files(source: str, data: DataSection) -> dict[str, str]:
    """Name to hash of the files of both splits; {} where they are not there, which loading says better."""
    from beavertails_v.locate import locate

    found: dict[str, str] = {}
    for split in (data.train_split, data.evaluation_split):
        if Path(source).exists():
            try:
                files = locate(source, split, data.categories, None)
            except ValueError:
                continue
            found |= {str(file.relative_to(files.root)): _data_hash(file) for file in files.paths}
    return found


def _data_hash(file: Path) -> str:
    pictures = _pictures(file) if file.suffix == ".jsonl" else ""
    changed = str(file.stat().st_mtime_ns) if file.stat().st_size > WHOLE else ""
    return hashlib.sha256(f"{file_hash(file)}{changed}{pictures}".encode()).hexdigest()[:16]


def _pictures(file: Path) -> str:
    """Names and sizes of the pictures that a jsonl names: another picture of the very same size goes unnoticed."""
    sizes = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            pictures = [file.parent / name for name in row.get("images") or [row["image"]]]
            sizes += [picture.stat().st_size for picture in pictures if picture.is_file()]
        except (ValueError, KeyError, TypeError, AttributeError, OSError):  # loading says what is wrong with the row
            continue
    return str(sizes)


def file_hash(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for i in range(BLOCKS):
                stream.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]
