"""Requests and answers as OpenAI's and LiteLLM's clients know them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from beavertails_v.taxonomy import Taxonomy
from guard.types import Verdict


class ModerationRequest(BaseModel):
    """As OpenAI's, with `response` (judge this answer to the input) and `reasons` beside it."""

    model_config = ConfigDict(extra="ignore")
    input: Any = Field(description="A string, a list of strings (a result each), or a list of parts (one result).",
                       examples=["how do i use this ?"])  # fmt: skip
    model: str | None = None
    response: str | None = Field(None, description="An answer to the input: this is judged then.")
    reasons: bool | None = Field(None, description="Say which rule decided.")


class GuardOptions(BaseModel):
    """What a request may ask of the guard; never more than the server allows."""

    model_config = ConfigDict(extra="forbid")
    rounds: int | None = Field(None, ge=0)
    feedback: Literal["blind", "guided"] | None = None
    stream: Literal["buffer", "sentence", "end"] | None = None
    deadline_s: float | None = Field(None, gt=0)
    reasons: bool | None = None
    attempts: bool = Field(False, description="Verdicts of every attempt, not of the last alone.")


class ChatRequest(BaseModel):
    """As OpenAI's; what is not named here is passed on to the model that answers."""

    model_config = ConfigDict(extra="allow")
    messages: list[Any]
    model: str | None = None
    n: int | None = Field(1, ge=1, le=16)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    seed: int | None = None
    guard: GuardOptions = GuardOptions()


class GuardrailRequest(BaseModel):
    """LiteLLM's generic guardrail."""

    model_config = ConfigDict(extra="ignore")
    texts: list[str] | None = None
    images: list[str] | None = None
    structured_messages: list[Any] | None = None
    tool_calls: list[Any] | None = None
    input_type: Literal["request", "response"] = "request"


def moderation(verdicts: Sequence[tuple[Verdict, Sequence[str]]], **shared: Any) -> dict[str, Any]:
    """The answer of /v1/moderations. verdicts: each with what was read, of "text" and "image"."""
    model = shared.pop("model")
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": model,
        "results": [result(verdict, read, **shared) for verdict, read in verdicts],
    }


def result(
    verdict: Verdict, read: Sequence[str], *, taxonomy: Taxonomy, thresholds: Mapping[str, float], reasons: bool
) -> dict[str, Any]:
    """One result: the 13 standard keys and our categories, and what OpenAI's shape has no place for."""
    scores = {name: float(verdict.categories.get(name, 0.0)) for name in taxonomy.secondary}
    if verdict.degraded and not verdict.failed_open:
        scores = dict.fromkeys(scores, 1.0)
    least = thresholds.get(verdict.kind, 0.5)
    raised = {name: verdict.flagged and (p >= least or name == verdict.top_category) for name, p in scores.items()}
    if verdict.degraded:
        raised = dict.fromkeys(scores, verdict.flagged)
    # a standard key stands for every category that can hold it, and so may be raised with them
    for key, names in taxonomy.standard.items():
        scores[key] = max((scores[name] for name in names), default=0.0)
        raised[key] = any(raised[name] for name in names)
    return {
        "flagged": verdict.flagged,
        "categories": raised,
        "category_scores": scores,
        "category_applied_input_types": {key: [] if verdict.degraded else list(read) for key in scores},
        **summary(verdict, reasons=reasons),
    }


def summary(verdict: Verdict, *, reasons: bool) -> dict[str, Any]:
    """A verdict in a few fields; why only where that is asked for, or where it was not judged."""
    found = {
        "kind": verdict.kind,
        "flagged": verdict.flagged,
        "action": verdict.action,
        "severity": verdict.severity.name.lower(),
        "severity_probabilities": list(verdict.severity_probabilities),
        "unsafe_probability": verdict.unsafe_probability,
        "category": verdict.top_category,
        "calibration_id": verdict.calibration_id,
        "truncated": verdict.truncated,
        "degraded": verdict.degraded,
        "failed_open": verdict.failed_open,
    }
    return found | ({"reason": verdict.reason} if reasons or verdict.degraded else {})


def error(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
