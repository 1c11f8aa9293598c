"""Write comparisons as the official BeaverTails-V layout: data/<category>/<split>.parquet, 16 columns, then extras."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from beavertails_v.errors import UserError
from beavertails_v.schema import Comparison
from beavertails_v.taxonomy import BENIGN, UNCATEGORISED, Taxonomy

#: Rows a group: a random row costs 5-9 ms at 100 rows a group and 305-465 ms at 3,000 (60 KB pictures).
ROW_GROUP = 100
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: The official columns, in official order and types; ids are strings there.
OFFICIAL: dict[str, pa.DataType] = {
    "question": pa.string(),
    "image": _IMAGE,
    "category": pa.string(),
    "image_severity": pa.int64(),
    "response_1": pa.string(),
    "response_2": pa.string(),
    "response_1_from": pa.string(),
    "response_2_from": pa.string(),
    "more_helpful_response_id": pa.string(),
    "is_response_1_safe": pa.string(),
    "is_response_2_safe": pa.string(),
    "safer_response_id": pa.string(),
    "response_1_harmless_rate": pa.int64(),
    "response_2_harmless_rate": pa.int64(),
    "response_1_helpful_rate": pa.int64(),
    "response_2_helpful_rate": pa.int64(),
}


class ExportError(UserError, ValueError):
    """A comparison cannot be written in the official layout. The message names its position and what to do."""


def write_beavertails_v(
    comparisons: Iterable[Comparison], folder: str | Path, split: str, *, overwrite: bool = False
) -> list[Path]:
    """Write one split; returns the files, one a category (`benign` where the prompt is, `uncategorised` without any).

    Extra columns: `question_severity` where a prompt has one, `response_k_category` where a response has its own,
    and every key of the prompts' meta. Each file appears whole or not at all. Raises ExportError for a prompt without
    exactly one picture, an unknown category, a meta key that cannot be a column, or files of this split being there
    already (unless overwrite, which replaces the split as a whole).
    """
    data = Path(folder) / "data"
    require_alone(Path(folder))
    comparisons = comparisons if isinstance(comparisons, Sequence) else list(comparisons)
    schema = _schema(comparisons)
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(comparisons):
        groups.setdefault(_require_writable(pair, i), []).append(i)
    there = sorted([*data.glob(f"*/{split}.parquet"), *data.glob(f"*/{split}-*-of-*.parquet")])
    if there and not overwrite:
        raise ExportError(f"{there[0]} is there already; write elsewhere, or pass overwrite=True to replace the split")
    written = [_write(data / name / f"{split}.parquet", comparisons, rows, schema) for name, rows in groups.items()]
    for stale in set(there) - set(written):
        stale.unlink()
    return written


def require_alone(folder: Path) -> None:
    """Raise ExportError where the folder holds rows in another layout: one would hide the other."""
    patterns = [f"{place}*.{kind}" for place in ("", "data/") for kind in ("jsonl", "parquet")]
    if others := [file.name for pattern in patterns for file in folder.glob(pattern)]:
        raise ExportError(f"{folder}: holds {others[0]} already, which data here would hide; choose another folder")


def to_row(pair: Comparison) -> dict[str, Any]:
    """One row under the official names, with the extra columns that the pair needs."""
    prompt, row = pair.prompt, _extras(pair)
    row |= {"question": prompt.text, "category": BENIGN if prompt.benign else prompt.category}
    row["image"] = {"bytes": prompt.images[0].encoded(), "path": None}
    row["more_helpful_response_id"] = str(pair.more_helpful + 1)
    row["safer_response_id"] = str(pair.safer + 1)
    for k, response in enumerate(pair.responses, 1):
        row[f"response_{k}"] = response.text
        row[f"response_{k}_from"] = response.source
        row[f"is_response_{k}_safe"] = "yes" if response.safe else "no"
        row[f"response_{k}_harmless_rate"] = response.harmless_rate
        row[f"response_{k}_helpful_rate"] = response.helpful_rate
    return row


def _require_writable(pair: Comparison, i: int) -> str:
    if len(pair.prompt.images) != 1:
        raise ExportError(f"comparison {i}: has {len(pair.prompt.images)} pictures; this layout holds one a row")
    if pair.prompt.category is not None and pair.prompt.category not in Taxonomy.load().parents:
        raise ExportError(f"comparison {i}: {Taxonomy.load().unknown(pair.prompt.category)}")
    return BENIGN if pair.prompt.benign else pair.prompt.category or UNCATEGORISED


def _schema(comparisons: Sequence[Comparison]) -> pa.Schema:
    """Official columns, then the extras any pair needs; marked so that `datasets` shows an Image."""
    extras: dict[str, list[Any]] = {}
    for pair in comparisons:
        row = {k: v for k, v in _extras(pair).items() if k not in OFFICIAL}
        for name, value in row.items():
            extras.setdefault(name, []).append(value)
    fields = [pa.field(name, kind) for name, kind in OFFICIAL.items()]
    for name, values in extras.items():
        try:
            fields.append(pa.field(name, pa.array(values).type))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ExportError(f"meta key {name!r}: values of several types cannot be one column ({error})") from error
    return pa.schema(fields)


def _extras(pair: Comparison) -> dict[str, Any]:
    extras = dict(pair.prompt.meta)
    if pair.prompt.severity is not None:
        extras["question_severity"] = int(pair.prompt.severity)
    for k, response in enumerate(pair.responses, 1):
        if response.category is not None:
            extras[f"response_{k}_category"] = response.category
    return extras


def _write(path: Path, comparisons: Sequence[Comparison], rows: list[int], schema: pa.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".parquet.partial")
    # Pictures are compressed already and never equal: neither a codec nor a dictionary has anything to gain on them.
    texts = [name for name in schema.names if name != "image"]
    codecs = dict.fromkeys(texts, "SNAPPY") | {"image.bytes": "NONE", "image.path": "NONE"}
    with pq.ParquetWriter(partial, _with_features(schema), use_dictionary=texts, compression=codecs) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            batch = [to_row(comparisons[i]) for i in rows[start : start + ROW_GROUP]]
            writer.write_table(pa.Table.from_pylist(batch, schema=_with_features(schema)), row_group_size=ROW_GROUP)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def _with_features(schema: pa.Schema) -> pa.Schema:
    """Adds the note by which the `datasets` library knows an image column; other columns speak for themselves."""
    from datasets import Features, Image

    features = Features.from_arrow_schema(schema)
    features["image"] = Image()
    info = {"info": {"features": features.to_dict()}}
    return schema.with_metadata({"huggingface": json.dumps(info)})
