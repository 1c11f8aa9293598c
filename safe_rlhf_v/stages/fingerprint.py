"""What stands in the files of a data set or a model, told before any row is checked: names with hashes.

Data are hashed in full, the pictures that rows name as well: one label or one pixel may have changed, and a time stamp
changes with every copy. It takes a second for 1.5 GB, and memory for one piece. Weights that were trained differ
everywhere: of a file above `WHOLE` bytes, its size and `BLOCKS` blocks spread over it tell.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beavertails_v.sources import ColumnMap
from safe_rlhf_v.config import DataSection

WHOLE, BLOCKS, BLOCK = 64 * 2**20, 64, 2**16
PIECE = 2**20
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
    return {file.name: weights_hash(file) for file in sorted(found) if file.is_file() and file.name not in RECORDS}


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
            column = _picture_column(data)
            found |= {str(file.relative_to(files.root)): _data_hash(file, column) for file in files.paths}
    return found


def _picture_column(data: DataSection) -> str:
    """The column that names pictures, beside `images`."""
    try:
        return (ColumnMap.load(data.columns).image_column if data.columns else None) or "image"
    except ValueError:  # loading says what is wrong with the map
        return "image"


def _data_hash(file: Path, column: str) -> str:
    pictures = "" if file.suffix == ".parquet" else str([file_hash(picture) for picture in _named(file, column)])
    return hashlib.sha256(f"{file_hash(file)}{pictures}".encode()).hexdigest()[:16]


def _named(file: Path, column: str) -> Iterator[Path]:
    """The pictures that rows name, each once; what is wrong with a row loading says."""
    seen: set[str] = set()
    for line in _content(file).splitlines():
        try:
            row = json.loads(line)
            names = [*(row.get("images") or []), row.get(column)]
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
        for name in names:
            if isinstance(name, str) and name not in seen and _is_file(file.parent / name):
                seen.add(name)
                yield file.parent / name


def _content(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile):  # loading says that it is damaged
        return b""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # base64 in place of a name
        return False


def file_hash(file: Path) -> str:
    """Of the whole file, read in pieces."""
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()[:16]


def weights_hash(file: Path) -> str:
    """Of the whole file up to `WHOLE` bytes, of a larger one by its blocks."""
    size = file.stat().st_size
    if size <= WHOLE:
        return file_hash(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for i in range(BLOCKS):
            stream.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]
