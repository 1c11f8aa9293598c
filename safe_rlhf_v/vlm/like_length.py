"""Rows of one batch in passes of like length, so that a processor does not compute the pads of the short ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from safe_rlhf_v.types import Responses

PASS = 150  # tokens whose computing takes about as long as starting one pass more


def of_like_length(responses: Responses) -> list[list[int]]:
    """Rows in parts, the longest first, each as wide as its longest; all in one, in order, where that saves nothing.

    On a CPU only: an accelerator takes longer to start a pass than to compute pads.
    """
    rows = list(range(len(responses)))
    if responses.ids.device.type != "cpu" or len(rows) < 2:
        return [rows]
    lengths = responses.mask.sum(1)
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    parts = _split([(i, int(lengths[i])) for i in order])
    return [[i for i, _ in part] for part in parts] if len(parts) > 1 else [rows]


def _split(rows: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
    """(row, length), the longest first, cut where most pads are saved, and each side again, while a pass pays."""
    longest = rows[0][1]
    saved = [(len(rows) - k) * (longest - rows[k][1]) for k in range(len(rows))]
    cut = max(range(len(rows)), key=saved.__getitem__)
    return [rows] if saved[cut] <= PASS else _split(rows[:cut]) + _split(rows[cut:])
