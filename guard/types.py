"""What the guard says about one query or one response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from beavertails_v.schema import Severity

Kind = Literal["query", "response"]
Action = Literal["allow", "regenerate", "refuse"]
ACTIONS: tuple[Action, ...] = ("allow", "regenerate", "refuse")  # from the mildest to the strictest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One moderation result. Probabilities are calibrated when `calibration_id` is not "none".

    kind: what was judged: a query (pictures and question alone) or a response (with its pictures and question).
    flagged: at least one rule of the severity policy fired.
    unsafe_probability: in 0..1.
    severity: the level whose cumulative probability still reaches 1/2, at least MINOR when flagged.
    severity_probabilities: of none, minor, moderate, severe; they sum to 1.
    categories: probability of each category of the taxonomy, independent of one another (they need not sum to 1).
    action: what the policy says to do.
    reason: the rule that decided, or why the guard failed closed.
    calibration_id: names weights and temperatures together; "none" for an uncalibrated guard.
    truncated: the content is longer than the model reads. Nothing is cut: such content fails closed.
    degraded: the model gave no usable answer (too long, NaN, unreadable picture) and the verdict is the strictest one.
    failed_open: a server could not judge the content and lets it pass, as it was told to; `degraded` too.
    """

    kind: Kind
    flagged: bool
    unsafe_probability: float
    severity: Severity
    severity_probabilities: tuple[float, float, float, float]
    categories: Mapping[str, float] = field(default_factory=dict)
    action: Action
    reason: str = ""
    calibration_id: str = "none"
    truncated: bool = False
    degraded: bool = False
    failed_open: bool = False

    @property
    def safe(self) -> bool:
        return not self.flagged

    @property
    def top_category(self) -> str | None:
        """The most probable category; None without any (an empty taxonomy, or a degraded verdict)."""
        return None if self.degraded or not self.categories else max(self.categories, key=self.categories.__getitem__)

    @property
    def expected_severity(self) -> float:
        """Mean level in 0..3."""
        return sum(level * p for level, p in enumerate(self.severity_probabilities))

    def strictness(self) -> tuple[int, float, float]:
        """Sort key: of several readings of one text the largest is the worst."""
        return ACTIONS.index(self.action), self.unsafe_probability, self.expected_severity

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` restores it exactly."""
        row = asdict(self)
        row["severity"] = self.severity.name.lower()
        row["severity_probabilities"] = list(self.severity_probabilities)
        row["top_category"] = self.top_category
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Verdict:
        known = {k: v for k, v in row.items() if k != "top_category"}
        known["severity"] = Severity[known["severity"].upper()]
        known["severity_probabilities"] = tuple(known["severity_probabilities"])
        return cls(**known)


def fail_closed(kind: Kind, reason: str, categories: tuple[str, ...] = (), *, truncated: bool = False,
                calibration_id: str = "none") -> Verdict:  # fmt: skip
    """The verdict for content that could not be judged: unsafe, severe, every category, refused."""
    return Verdict(
        kind=kind,
        flagged=True,
        unsafe_probability=1.0,
        severity=Severity.SEVERE,
        severity_probabilities=(0.0, 0.0, 0.0, 1.0),
        categories=dict.fromkeys(categories, 1.0),
        action="refuse",
        reason=reason,
        calibration_id=calibration_id,
        truncated=truncated,
        degraded=True,
    )


def fail_open(kind: Kind, reason: str, *, calibration_id: str = "none") -> Verdict:
    """The verdict for content that could not be judged where a server is told to let such content pass."""
    return Verdict(
        kind=kind,
        flagged=False,
        unsafe_probability=0.0,
        severity=Severity.NONE,
        severity_probabilities=(1.0, 0.0, 0.0, 0.0),
        action="allow",
        reason=reason,
        calibration_id=calibration_id,
        degraded=True,
        failed_open=True,
    )
