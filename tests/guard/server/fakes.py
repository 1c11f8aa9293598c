"""A guard that judges by marks, and a model that answers from a list: both deterministic, both fast."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from beavertails_v.schema import Severity
from beavertails_v.taxonomy import Taxonomy
from guard.items import FAULTS, prompt_of
from guard.types import Verdict, fail_closed

CATEGORIES = Taxonomy.load().secondary
RED, GREEN = (200, 20, 20), (20, 200, 20)


def png(colour: tuple[int, int, int] = GREEN, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image(colour: tuple[int, int, int] = GREEN) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(png(colour))}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@dataclass(frozen=True)
class MakeMarks:
    """Picklable. longest: characters that it reads."""

    longest: int = 10_000
    kinds: tuple[str, ...] = ("query", "response")

    def __call__(self) -> Marks:
        return Marks(self)


class Marks:
    """Unsafe where a text holds BAD or a picture is red; WORSE is refused. DIE, HANG, SPILL: what the words say."""

    def __init__(self, made_of: MakeMarks) -> None:
        self.longest = made_of.longest
        self.info = {
            "kinds": made_of.kinds,
            "categories": CATEGORIES,
            "calibration_id": "fake",
            "refusal": "No.",
            "category_threshold": {"query": 0.5, "response": 0.5},
            "golden": 0,
        }

    def __call__(self, payloads: Sequence[Any]) -> tuple[list[Any], dict[str, float]]:
        texts = "".join(item.text + (item.response or "") for item in payloads)
        if "DIE" in texts:
            os._exit(3)
        if "HANG" in texts:
            time.sleep(60)
        if "SPILL" in texts:
            raise MemoryError("no memory")
        return [self._one(item) for item in payloads], {"encoding": 0.0, "forward": 0.0}

    def _one(self, item: Any) -> Verdict | Exception:
        try:
            prompt = prompt_of(item.pictures, item.text)
            reds = [p.load().getpixel((0, 0))[0] > 100 for p in prompt.images]
        except FAULTS as error:
            return error
        judged = item.text if item.response is None else item.response
        if len(item.text) + len(item.response or "") > self.longest:
            return fail_closed(item.kind, "too long", CATEGORIES, truncated=True, calibration_id="fake")
        unsafe = "BAD" in judged or "WORSE" in judged or (item.response is None and any(reds))
        strict = item.response is None or "WORSE" in judged
        return Verdict(
            kind=item.kind,
            flagged=unsafe,
            unsafe_probability=0.9 if unsafe else 0.1,
            severity=Severity.MODERATE if unsafe else Severity.NONE,
            severity_probabilities=(0.1, 0.1, 0.7, 0.1) if unsafe else (0.9, 0.1, 0.0, 0.0),
            categories=dict.fromkeys(CATEGORIES, 0.05) | ({"animal_abuse": 0.8} if unsafe else {}),
            action=("refuse" if strict else "regenerate") if unsafe else "allow",
            reason="unsafe 0.9 >= 0.5" if unsafe else "no rule fired",
            calibration_id="fake",
        )


def completion(*texts: str, **message: Any) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": one} | message, "finish_reason": "stop"}
        for i, one in enumerate(texts)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 2 * len(texts), "total_tokens": 1 + 2 * len(texts)}
    return {"id": "up-1", "object": "chat.completion", "created": 1, "model": "up", "choices": choices, "usage": usage}


@dataclass
class Model:
    """An upstream: `answers` are given in turn, the last one for ever; what it was asked is kept."""

    answers: list[Any]
    asked: list[dict[str, Any]] = field(default_factory=list)

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer(body)
        if isinstance(answer, httpx.Response):
            return answer
        if isinstance(answer, str):
            answer = completion(*[answer] * int(body.get("n") or 1))
        if not body.get("stream"):
            return httpx.Response(200, json=answer)
        return httpx.Response(200, content=_events(answer), headers={"content-type": "text/event-stream"})


def _events(answer: dict[str, Any]) -> bytes:
    """The answer in chunks of five characters, the choices in turn."""
    lines = []
    for choice in answer["choices"]:
        words = choice["message"]["content"] or ""
        deltas: list[dict[str, Any]] = [{"content": words[i : i + 5]} for i in range(0, len(words), 5)]
        if calls := choice["message"].get("tool_calls"):
            for call in calls:  # as models stream them: the name, then the arguments letter by letter
                deltas.append({"tool_calls": [{"index": 0, "function": {"name": call["function"]["name"]}}]})
                pieces = [{"index": 0, "function": {"arguments": letter}} for letter in call["function"]["arguments"]]
                deltas += [{"tool_calls": [piece]} for piece in pieces]
        for delta in [{"role": "assistant"}, *deltas, {}]:
            reason = None if delta else choice["finish_reason"]
            lines.append({"choices": [{"index": choice["index"], "delta": delta, "finish_reason": reason}]})
    lines.append({"choices": [], "usage": answer["usage"]})
    return b"".join(b"data: " + json.dumps(line).encode() + b"\n\n" for line in lines) + b"data: [DONE]\n\n"
