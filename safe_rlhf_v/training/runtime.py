"""What a loop needs around the maths: the order of the data, random states, records, the mean over ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from beavertails_v.errors import UserError
from safe_rlhf_v.distributed.fsdp2 import is_sharded
from safe_rlhf_v.files import replace_text


class NotFinite(UserError, FloatingPointError, ValueError):
    """A loss, a gradient or a score is NaN or infinite. The message names the step and says what to do."""


class ShuffledIndices:
    """0..n-1 in shuffled epochs, for ever. An epoch's order follows from seed and epoch: two numbers save the place."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError("there is nothing to draw from: the list is empty")
        self.n, self.seed = n, seed
        self.epoch, self.cursor = 0, 0
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.n, generator=generator).tolist()  # type: ignore[no-any-return]

    def take(self, count: int) -> list[int]:
        """The next `count` indices, over the end of an epoch if need be."""
        taken: list[int] = []
        while len(taken) < count:
            if self.cursor == self.n:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._shuffle()
            part = self._order[self.cursor : self.cursor + count - len(taken)]
            self.cursor += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._order = self._shuffle()


class MetricsLog:
    """metrics.jsonl, one line a step. A resumed run cuts it back to the checkpoint's step first: no step is twice."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= step] if step else []
        replace_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append and bring to the disk: a checkpoint never knows of a step that metrics.jsonl lost. NaN is an error."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file; a last line without its end (a kill while writing) is left out. [] without a file."""
    return path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.is_file() else []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in read_lines(path)]


class Averages:
    """Weighted means of named numbers."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float = 1.0) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def merge(self, other: Averages) -> None:
        """Take over all that another has added."""
        for name, weight in other._weights.items():
            self._sums[name] = self._sums.get(name, 0.0) + other._sums[name]
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        return {name: self._sums[name] / self._weights[name] for name in self._sums}


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean over ranks of each gradient; a rank that has none counts as zero, so that no rank waits for another.

    Those of sharded parameters are means already.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if is_sharded(parameter):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))


def fingerprint(texts: Iterable[str]) -> str:
    """A hash of texts in their order, to notice that the data changed between two runs."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def named(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain values, with the name of its class."""
    return {"name": type(settings).__name__, **(asdict(settings) if is_dataclass(settings) else {})}  # type: ignore[arg-type]
