"""The models that answer behind the proxy: another server, or a model of this machine. Both give OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx

from beavertails_v.errors import UserError
from guard.server.content import Reader, RequestError, asked_of
from guard.server.pool import NotDone, Pool, QueueFull
from guard.server.settings import ServeSettings
from guard.server.work import Ask

UPSTREAM_KEY = "SAFE_RLHF_V_UPSTREAM_KEY"


class UpstreamError(UserError, RuntimeError):
    """The model that answers did not. status: what to tell the client."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class Upstream(Protocol):
    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of OpenAI's shape. Raises UpstreamError, or RequestError where it says the request is at fault."""
        ...

    def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        ...

    async def close(self) -> None: ...


class HttpUpstream:
    """Another server. Its key is in SAFE_RLHF_V_UPSTREAM_KEY."""

    def __init__(self, settings: ServeSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        upstream = settings.upstream
        self.model = upstream.model
        key = os.environ.get(UPSTREAM_KEY)
        self._client = httpx.AsyncClient(
            base_url=str(upstream.url).rstrip("/") + "/",
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=upstream.timeout_s,
            transport=transport,
        )

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._client.post("chat/completions", json=self._asked(body, stream=False))
        except httpx.HTTPError as error:
            raise UpstreamError(f"the model behind the guard does not answer ({type(error).__name__})") from None
        _require_ok(answer.status_code, answer.text)
        try:
            found = answer.json()
            if not all(isinstance(c["message"], dict) for c in found["choices"]) or not found["choices"]:
                raise ValueError("no choices")
        except (ValueError, TypeError, KeyError):
            raise UpstreamError("the model behind the guard gave no chat completion") from None
        return found  # type: ignore[no-any-return]

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        asked = self._asked(body, stream=True)
        try:
            async with self._client.stream("POST", "chat/completions", json=asked) as answer:
                if answer.status_code != 200:
                    _require_ok(answer.status_code, (await answer.aread()).decode(errors="replace"))
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data and data != "[DONE]":
                        yield json.loads(data)
        except (httpx.HTTPError, ValueError) as error:
            raise UpstreamError(f"the model behind the guard broke off ({type(error).__name__})") from None

    async def close(self) -> None:
        await self._client.aclose()

    def _asked(self, body: Mapping[str, Any], stream: bool) -> dict[str, Any]:
        asked = {k: v for k, v in body.items() if k not in ("guard", "stream", "stream_options") and v is not None}
        if self.model:
            asked["model"] = self.model
        return asked | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


class LocalUpstream:
    """A model of this machine, in a worker of its own. Turns become one question: it was trained on single ones."""

    def __init__(self, pool: Pool, settings: ServeSettings) -> None:
        self.pool, self.settings = pool, settings

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        turns = await Reader(self.settings, _no_fetch).messages(body["messages"])
        asked = asked_of([turn for turn in turns if turn.role != "system"] or turns)
        temperature = body.get("temperature")
        ask = Ask(
            text=asked.text,
            pictures=asked.pictures,
            max_tokens=int(
                body.get("max_completion_tokens") or body.get("max_tokens") or self.settings.upstream.max_tokens
            ),
            temperature=1.0 if temperature is None else float(temperature),
            top_p=float(body.get("top_p") or 1.0),
        )
        try:
            futures = [
                self.pool.submit(ask, timeout_s=self.settings.upstream.timeout_s) for _ in range(body.get("n") or 1)
            ]
            found = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except QueueFull:
            raise UpstreamError("too many answers are waiting", 503) from None
        except NotDone as error:
            raise UpstreamError(f"the local policy gave no answer: {error}") from None
        except ValueError as error:
            raise RequestError(str(error), "messages") from None
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if ended else "length",
                "logprobs": None,
            }
            for i, (text, _, ended) in enumerate(found)
        ]
        tokens = sum(count for _, count, _ in found)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": str(self.settings.upstream.model or body.get("model") or "local"),
            "choices": choices,
            "usage": {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens},
        }

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        whole = await self.complete(body)
        for choice in whole["choices"]:
            delta = {"index": choice["index"], "delta": choice["message"], "finish_reason": choice["finish_reason"]}
            yield whole | {"object": "chat.completion.chunk", "choices": [delta], "usage": None}
        yield whole | {"object": "chat.completion.chunk", "choices": []}

    async def close(self) -> None:
        await asyncio.to_thread(self.pool.close)


async def _no_fetch(url: str) -> bytes:
    raise RequestError("a local policy takes pictures as data: addresses alone", code="remote_pictures_off")


def _require_ok(status: int, text: str) -> None:
    if status == 200:
        return
    if status in (400, 404, 413, 422):
        raise RequestError(f"the model behind the guard refuses the request ({status}): {text[:300]}", status=status)
    raise UpstreamError(f"the model behind the guard answered {status}", 503 if status in (429, 503) else 502)
