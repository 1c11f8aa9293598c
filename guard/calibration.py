"""Temperature scaling, one temperature a head (Guo et al., arXiv 1706.04599, sec. 4.2), fitted on held-out rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from guard import losses
from guard.metrics import binary_calibration, severity_calibration
from safe_rlhf_v.vlm.weights import DamagedFile, read_json

HEADS = ("query", "response", "severity", "category")
_LOG_T_BOUND = math.log(20.0)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """B rows of labels; -1 is unknown. is_response (B,) bool; unsafe, severity (B,) long; categories (B, K) long."""

    is_response: Tensor
    unsafe: Tensor
    severity: Tensor
    categories: Tensor

    def to(self, device: torch.device | str) -> Labels:
        return Labels(**{name: value.to(device) for name, value in vars(self).items()})

    def known_where(self, keep: Tensor) -> Labels:
        """These labels on the rows of `keep` (B,) bool, unknown on the others."""
        pick = lambda t: torch.where(keep.view(-1, *[1] * (t.ndim - 1)), t, -1)  # noqa: E731
        return Labels(
            is_response=self.is_response,
            unsafe=pick(self.unsafe),
            severity=pick(self.severity),
            categories=pick(self.categories),
        )

    def __len__(self) -> int:
        return self.unsafe.shape[0]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperatures by head (1 where nothing could be fitted) of the weights whose hash is `weights`.

    report: per head n, nll, ece and brier before and after, on the rows that the temperatures were fitted on.
    """

    temperatures: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(HEADS, 1.0))
    weights: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Changes with any temperature and any weight; "none" before a fit."""
        if not self.weights:
            return "none"
        content = json.dumps({"temperatures": dict(self.temperatures), "weights": self.weights}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        row = {"id": self.id, "temperatures": dict(self.temperatures), "weights": self.weights, "report": self.report}
        Path(path).write_text(json.dumps(row, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        row = read_json(Path(path))
        if not isinstance(row, dict) or not {"id", "temperatures", "weights", "report"} <= row.keys():
            raise DamagedFile(f"{path} holds no calibration of a guard: copy it from where the guard was trained")
        made = cls(temperatures=row["temperatures"], weights=row["weights"], report=row["report"])
        if made.id != row["id"]:
            raise DamagedFile(f"{path}: field 'id' is {row['id']!r} but the contents give {made.id!r}; calibrate again")
        return made


def scaled(logits: Mapping[str, Tensor], temperatures: Mapping[str, float]) -> dict[str, Tensor]:
    """Logits of each head over its temperature, in float64. unsafe (B, 2), severity (B, 3), category (B, K)."""
    pair = torch.tensor([temperatures["query"], temperatures["response"]], dtype=torch.float64)
    return {
        "unsafe": logits["unsafe"].double() / pair.to(logits["unsafe"].device),
        "severity": logits["severity"].double() / temperatures["severity"],
        "category": logits["category"].double() / temperatures["category"],
    }


def fit_temperature(nll: Callable[[float], float], n: int) -> float:
    """The temperature that minimises `nll(T)` (a mean over n rows) plus (log T)^2 / 2n.

    The second term is a unit normal prior on log T [ours]: without it, rows that the head ranks perfectly drive T to 0
    and every probability to exactly 0 or 1.
    """
    found = minimize_scalar(
        lambda log_t: nll(math.exp(log_t)) + log_t**2 / (2 * n),
        bounds=(-_LOG_T_BOUND, _LOG_T_BOUND),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(found.x))


def fit(logits: Mapping[str, Tensor], labels: Labels, weights: str) -> Calibration:
    """Fit every head's temperature on held-out rows. `weights` is the hash of what made the logits."""
    temperatures: dict[str, float] = {}
    report: dict[str, dict[str, Any]] = {}
    for head in HEADS:
        nll, n, figures = _head(head, logits, labels)
        t = fit_temperature(nll, n) if n else 1.0
        temperatures[head] = t
        report[head] = {"n": n, "temperature": t}
        for stage, value in (("before", 1.0), ("after", t)) if n else ():
            report[head][stage] = {"nll": nll(value), **figures(value)}
    return Calibration(temperatures=temperatures, weights=weights, report=report)


_Figures = Callable[[float], dict[str, float | None]]


def _head(head: str, logits: Mapping[str, Tensor], labels: Labels) -> tuple[Callable[[float], float], int, _Figures]:
    """(nll of a temperature, number of labelled rows, ece and brier of a temperature)."""
    if head == "severity":
        z, known = logits["severity"].double(), labels.severity >= 0
        return (
            lambda t: float(losses.severity_loss(z / t, labels.severity, labels.unsafe)),
            int((known | (labels.unsafe == 1)).sum()),
            lambda t: severity_calibration(
                labels.severity[known].numpy(), losses.severity_probabilities(z[known] / t).numpy()
            ),
        )
    if head == "category":
        z, known = logits["category"].double(), labels.categories >= 0
        return (
            lambda t: float(losses.category_loss(z / t, labels.categories)),
            int(known.any(-1).sum()),
            lambda t: binary_calibration(labels.categories[known].numpy(), (z[known] / t).sigmoid().numpy()),
        )
    rows = (labels.is_response == (head == "response")) & (labels.unsafe >= 0)
    z, truth = logits["unsafe"][rows].double(), labels.unsafe[rows]
    own = labels.is_response[rows]
    return (
        lambda t: float(losses.unsafe_loss(z / t, truth, own)),
        int(rows.sum()),
        lambda t: binary_calibration(truth.numpy(), (losses.unsafe_logit(z, own) / t).sigmoid().numpy()),
    )
