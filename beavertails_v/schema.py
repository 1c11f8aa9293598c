"""What one row of image-text preference data is, whatever file it came from.

Two preferences stand side by side and are never merged: which response is *more helpful* and which is *safer*.
Rates follow BeaverTails-V (arXiv 2503.17682): helpfulness 0..3, judged ignoring safety; harmlessness -3..3, below 0
unsafe. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.images import Picture


class Severity(IntEnum):
    """Graded harm. BeaverTails-V wording: -1 mildly, -2 significantly, -3 extremely harmful."""

    NONE = 0
    MINOR = 1
    MODERATE = 2
    SEVERE = 3

    @classmethod
    def from_harmless_rate(cls, rate: int) -> Severity:
        """Severity of a response rated `rate` in -3..3: -3 is SEVERE, 0 and above NONE."""
        return cls(max(0, -rate))


class SchemaError(UserError, ValueError):
    """A row breaks an invariant. The message names the field, the value and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question with zero or more pictures.

    category: secondary category name of the taxonomy, or None where the prompt is harmless or the data does not say.
    benign: the data calls the prompt harmless. severity: harm of the prompt itself; None where the data does not say.
    meta: columns of the source that the schema does not know, kept as they came.
    """

    text: str
    images: tuple[Picture, ...] = ()
    category: str | None = None
    severity: Severity | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    benign: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise SchemaError("field 'text': the question is empty; give the prompt some text")
        if self.benign and self.category is not None:
            raise SchemaError(f"field 'benign': the prompt has category {self.category!r}; a harmless prompt has none")

    @property
    def harmful(self) -> bool | None:
        """Whether the prompt invites harm, by its labels; None where they do not say: unknown is not harmless."""
        if self.category is not None:
            return True
        if self.benign or self.severity is None:
            return False if self.benign else None
        return self.severity > Severity.NONE

    @property
    def id(self) -> str:
        """Content hash of the text and the encoded pictures: equal prompts share it, in any file."""
        digest = hashlib.sha256(self.text.encode())
        for image in self.images:
            digest.update(image.sha256.encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One answer with its own labels. Rates are None where the data set has none.

    category: what the answer itself was labelled with; None where the data set labels the prompt or the pair only.
    """

    text: str
    safe: bool
    harmless_rate: int | None = None
    helpful_rate: int | None = None
    source: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.safe, bool):
            raise SchemaError(f"field 'safe': {self.safe!r} is neither True nor False")
        if self.harmless_rate is not None and not -3 <= self.harmless_rate <= 3:
            raise SchemaError(f"field 'harmless_rate': {self.harmless_rate} is outside -3..3")
        if self.helpful_rate is not None and not 0 <= self.helpful_rate <= 3:
            raise SchemaError(f"field 'helpful_rate': {self.helpful_rate} is outside 0..3")
        if self.harmless_rate is not None and self.safe != (self.harmless_rate >= 0):
            raise SchemaError(
                f"field 'safe': {self.safe} contradicts harmless_rate {self.harmless_rate} (>= 0 is safe)"
            )

    @property
    def severity(self) -> Severity | None:
        """Severity from the harmless rate; NONE for a safe response without one; None if unsafe and ungraded."""
        if self.harmless_rate is not None:
            return Severity.from_harmless_rate(self.harmless_rate)
        return Severity.NONE if self.safe else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses to one prompt, in data-set order, with two independent preferences (indices 0 or 1)."""

    prompt: Prompt
    responses: tuple[Response, Response]
    more_helpful: int
    safer: int

    def __post_init__(self) -> None:
        for name in ("more_helpful", "safer"):
            if getattr(self, name) not in (0, 1):
                raise SchemaError(f"field '{name}': {getattr(self, name)!r} is not 0 or 1; resolve or drop ties")

    @property
    def tied_safety(self) -> bool:
        """True where both harmless rates are known and equal, so that the safer id was forced."""
        first, second = (r.harmless_rate for r in self.responses)
        return first is not None and first == second

    @property
    def contradiction(self) -> str | None:
        """Why the labels cannot all be true, or None (2 of 590 evaluation pairs of BeaverTails-V)."""
        safer, other = self.responses[self.safer], self.responses[1 - self.safer]
        if not safer.safe and other.safe:
            return "the safer response is labelled unsafe while the other is labelled safe"
        low, high = safer.harmless_rate, other.harmless_rate
        if low is not None and high is not None and low < high:
            return f"the safer response has harmless_rate {low}, below the other's {high}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledResponse:
    """One response to one prompt: the unit of guard training, and of the single-response release."""

    prompt: Prompt
    response: Response
