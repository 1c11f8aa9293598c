"""Pairs for the direct methods: which are trained on, their batches, and what is computed of them once at the start.

Shapes: N pairs, B of them in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from beavertails_v.schema import Comparison, LabelledResponse, Prompt
from safe_rlhf_v.algorithms.protocol import DirectAlgorithm
from safe_rlhf_v.files import replacing
from safe_rlhf_v.training.encode import DataError, PairCollator, ResponseCollator, interleaved, pair_rows
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.weights import DamagedFile, require_complete


class DirectRows(Dataset[Any]):
    """Pairs with columns, (N, 2) tensors by name. `partner` names another pair, always of another prompt.

    left_out: what cannot be encoded or, for an algorithm that learns nothing of it, is of two unsafe responses.
    """

    def __init__(
        self,
        data: Sequence[Comparison],
        encoder: Encoder,
        algorithm: DirectAlgorithm | None = None,
    ) -> None:
        """algorithm: what the rows train; None for rows that are only measured."""
        drops = algorithm is not None and algorithm.drops_both_unsafe
        self._rows = pair_rows(data, encoder, _both_unsafe if drops else None)
        self.left_out = self._rows.left_out
        self.columns: dict[str, Tensor] = {}
        self.demonstrations: Sequence[LabelledResponse] | Any = ()
        self.shown: list[int] = []  # of each pair its demonstration
        self.partner = _partners(self._rows) if algorithm is not None and algorithm.needs_mismatched else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        other = {} if self.partner is None else {"partner": self._rows[self.partner[i]]}
        other |= {"shown": self.demonstrations[self.shown[i]]} if self.shown else {}
        return {"row": self._rows[i], **other, "columns": {name: values[i] for name, values in self.columns.items()}}

    def imitate(self, demonstrations: Sequence[LabelledResponse] | Any, seed: int) -> None:
        """Give each pair one of the M demonstrations: all of them in a random order, then all again in another."""
        generator = torch.Generator().manual_seed(seed)
        rounds = range(-(-len(self) // len(demonstrations)))
        order = torch.cat([torch.randperm(len(demonstrations), generator=generator) for _ in rounds])
        self.demonstrations, self.shown = demonstrations, order[: len(self)].tolist()

    def prompts(self) -> list[Prompt]:
        """Every prompt once, in order."""
        found = {row.prompt.id: row.prompt for row in (self._rows[i] for i in range(len(self)))}
        return list(found.values())

    def digest(self) -> str:
        """Tells two sets of rows apart by prompts, pictures, texts and partners."""
        digest = hashlib.sha256(str(self.partner).encode())
        for i in range(len(self)):
            row = self._rows[i]
            digest.update(repr((row.prompt.id, *(r.text for r in row.responses))).encode())
        return digest.hexdigest()


def _both_unsafe(row: Comparison) -> tuple[str, str] | None:
    if any(r.safe for r in row.responses):
        return None
    return "both_unsafe", "both responses are unsafe; the algorithm learns of pairs with a safe one only"


def _partners(rows: Sequence[Comparison] | Any) -> list[int]:
    """For each pair the next one, going round, of another prompt. Raises DataError where all share one prompt."""
    ids = [rows[i].prompt.id for i in range(len(rows))]
    if len(set(ids)) == 1:
        raise DataError("KTO compares responses across prompts: give it pairs of at least two different prompts")
    partners, after = [0] * len(ids), 0
    for i in reversed(range(2 * len(ids))):  # twice round, backwards: `after` is the next pair of another prompt
        here, following = i % len(ids), (i + 1) % len(ids)
        after = following if ids[following] != ids[here] else after
        partners[here] = after
    return partners


@dataclass(frozen=True, slots=True)
class DirectCollator:
    """Rows to what PairCollator gives, the columns (B, 2), and with partners `mismatched`, their 2B responses, and with
    demonstrations `shown_prompts` and `shown_responses`, B of each.

    Columns "rewards" and "costs" become those of the PairBatch.
    """

    encoder: Encoder

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = PairCollator(self.encoder)([r["row"] for r in rows])
        columns = {name: torch.stack([r["columns"][name] for r in rows]) for name in rows[0]["columns"]}
        scores = {name: columns.pop(name) for name in ("rewards", "costs") if name in columns}
        batch["pairs"] = replace(batch["pairs"], **scores)
        if "partner" in rows[0]:
            texts = [[r["partner"].responses[k].text for r in rows] for k in (0, 1)]
            batch["mismatched"] = interleaved((self.encoder.responses(texts[0]), self.encoder.responses(texts[1])))
        if "shown" in rows[0]:
            shown = ResponseCollator(self.encoder)([r["shown"] for r in rows])
            batch |= {f"shown_{name}": values for name, values in shown.items()}
        return batch | columns


def read_columns(path: Path, key: str) -> dict[str, Tensor] | None:
    """The columns written for this key; None where there are none, or a damaged file: they are computed once more."""
    try:
        require_complete(path)
    except DamagedFile:
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_columns(path: Path, key: str, columns: Mapping[str, Tensor]) -> None:
    """Whole or not at all."""
    with replacing(path) as beside:
        save_file({name: values.contiguous() for name, values in columns.items()}, beside, metadata={"key": key})
