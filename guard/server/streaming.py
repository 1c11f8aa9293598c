"""Streamed answers: no text leaves before its verdict.

buffer: the whole loop runs, then its answer is sent. end: one attempt, judged when it is whole. sentence: an answer is
judged as far as it goes at the end of every sentence, and what passed is sent; once something was sent there is no new
attempt, and a flagged sentence ends the choice with finish_reason "content_filter".
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guard.server.chat import Choice, Conversation, Loop
from guard.types import Verdict

_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f\u061f])\s|\n")
_PIECE = re.compile(r"\S+\s*|\s+")
HEARTBEAT_SECONDS = 10.0


@dataclass(slots=True)
class _Part:
    """A choice as it streams in. sent: characters of `text` that have left."""

    choice: Choice
    text: str = ""
    sent: int = 0
    judged: int = 0
    extra: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    over: bool = False


class Stream:
    """The chunks of one answer."""

    def __init__(self, loop: Loop, talk: Conversation) -> None:
        self.loop, self.talk = loop, talk
        self.mode = talk.options.stream or loop.settings.guard.stream
        self._head = {
            "id": f"chatcmpl-{time.time_ns():x}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": str(talk.body.get("model") or "guarded"),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; a comment every ten seconds while nothing may leave yet."""
        source = self._sentences() if self.mode == "sentence" else self._whole()
        pending: asyncio.Future[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(source, None))
                done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT_SECONDS)
                if not done:
                    yield b": the guard is judging\n\n"
                    continue
                chunk, pending = pending.result(), None
                if chunk is None:
                    break
                yield b"data: " + json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await source.aclose()

    def _chunk(self, index: int, delta: Mapping[str, Any], reason: str | None = None, **extra: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "finish_reason": reason, "logprobs": None}
        return self._head | {"choices": [choice]} | extra

    def _last(self, usage: Mapping[str, int], report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A chunk without choices: what the guard did, and the usage where it was asked for."""
        wanted = (self.talk.body.get("stream_options") or {}).get("include_usage")
        return [self._head | {"choices": [], "guard": report} | ({"usage": dict(usage)} if wanted else {})]

    async def _whole(self) -> AsyncGenerator[dict[str, Any], None]:
        if self.mode == "end":
            self.talk.options = self.talk.options.model_copy(update={"rounds": 0})
        whole = await self.loop.answer(self.talk)
        for choice in whole["choices"]:
            message, index = choice["message"], choice["index"]
            yield self._chunk(index, {"role": "assistant", "content": ""})
            for piece in _PIECE.findall(str(message.get("content") or "")):
                yield self._chunk(index, {"content": piece})
            if calls := message.get("tool_calls"):
                yield self._chunk(index, {"tool_calls": [{"index": k} | call for k, call in enumerate(calls)]})
            yield self._chunk(index, {}, choice["finish_reason"])
        for chunk in self._last(whole["usage"], whole["guard"]):
            yield chunk

    async def _sentences(self) -> AsyncGenerator[dict[str, Any], None]:
        talk, loop = self.talk, self.loop
        parts = [_Part(Choice(i)) for i in range(int(talk.body.get("n") or 1))]
        ends = time.monotonic() + loop._deadline(talk)
        query = None
        if loop.moderator.can_judge("query"):
            query = asyncio.ensure_future(loop.moderator.judge_query(talk.turns))
        source = loop.upstream.stream(talk.body)
        try:
            while not all(part.over for part in parts):
                try:
                    chunk = await asyncio.wait_for(anext(source, None), max(0.01, ends - time.monotonic()))
                except TimeoutError:
                    for part in parts:
                        for out in self._cut(part, "deadline"):
                            yield out
                    break
                if chunk is None:
                    break
                self._take(parts, chunk)
                if query is not None and any(_SENTENCE.search(p.text, p.judged) for p in parts):
                    if (refused := await self._query(query, parts)) is not None:
                        for one in refused:
                            yield one
                        break
                    query = None
                for part in parts:
                    for out_chunk in await self._pass(part, whole=False):
                        yield out_chunk
            if query is not None and not all(part.over for part in parts):
                for one in await self._query(query, parts) or []:
                    yield one
            for part in parts:
                for out_chunk in await self._pass(part, whole=True):
                    yield out_chunk
        finally:
            await source.aclose()  # type: ignore[attr-defined]
            if query is not None:
                query.cancel()
        choices = [part.choice for part in parts]
        loop._write(talk, choices)
        for choice in choices:
            loop.moderator.metrics.outcomes.labels(choice.outcome).inc()
        for chunk in self._last(talk.usage, loop.report(talk, choices)):
            yield chunk

    async def _query(self, query: asyncio.Future[Verdict], parts: list[_Part]) -> list[dict[str, Any]] | None:
        """The refusal where the question is refused, else None."""
        self.talk.query = await query
        if self.talk.query.action != "refuse":
            return None
        return [out for part in parts for out in self._cut(part, "query_refused")]

    def _take(self, parts: list[_Part], chunk: Mapping[str, Any]) -> None:
        for key, value in (chunk.get("usage") or {}).items():
            if isinstance(value, int):
                self.talk.usage[key] = value
        for choice in chunk.get("choices") or []:
            index = int(choice.get("index") or 0)
            if index >= len(parts):
                continue  # more choices than were asked for
            part, delta = parts[index], dict(choice.get("delta") or {})
            part.text += str(delta.pop("content", None) or "")
            delta.pop("role", None)
            if delta := {k: v for k, v in delta.items() if v}:
                part.extra.append(delta)
            part.reason = choice.get("finish_reason") or part.reason

    async def _pass(self, part: _Part, whole: bool) -> list[dict[str, Any]]:
        """Judge what came up to the last whole sentence, or all of it; what may leave."""
        if part.over:
            return []
        ends = [found.end() for found in _SENTENCE.finditer(part.text)]
        upto = len(part.text) if whole else max(ends, default=0)
        if upto <= part.judged and not whole:
            return []
        text = part.text[:upto]
        if whole:
            text = "\n".join(filter(None, [text, self.loop.text_of(_merged(part.extra))]))
        verdict = await self.loop._verdict(self.talk, text)
        part.choice.verdicts.append(verdict)
        part.choice.texts.append(text)
        part.judged = upto
        if verdict.action != "allow":
            return self._cut(part, "response_refused" if verdict.action == "refuse" else "gave_up")
        out = []
        if not part.sent:
            out.append(self._chunk(part.choice.index, {"role": "assistant", "content": ""}))
        if upto > part.sent:
            out.append(self._chunk(part.choice.index, {"content": part.text[part.sent : upto]}))
        part.sent = max(upto, part.sent)
        if whole:
            out += [self._chunk(part.choice.index, delta) for delta in part.extra]
            out.append(self._chunk(part.choice.index, {}, part.reason or "stop"))
            part.over, part.choice.outcome = True, "answered"
        return out

    def _cut(self, part: _Part, outcome: str) -> list[dict[str, Any]]:
        """The end of a choice: the refusal where nothing was sent yet, and the reason."""
        if part.over:
            return []
        part.over, part.choice.outcome = True, outcome
        refusal = str(self.loop.moderator.info.get("refusal", "")) if not part.sent else ""
        first = [self._chunk(part.choice.index, {"role": "assistant", "content": refusal})] if refusal else []
        return [*first, self._chunk(part.choice.index, {}, "content_filter")]


def _merged(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Streamed pieces as one message: texts and the arguments of a call come a few characters at a time."""
    calls: dict[int, dict[str, str]] = {}
    texts: dict[str, str] = {}
    for delta in deltas:
        former = [{"index": -1, "function": delta["function_call"]}] if delta.get("function_call") else []
        for call in [*(delta.get("tool_calls") or []), *former]:
            kept = calls.setdefault(int(call.get("index") or 0), {"name": "", "arguments": ""})
            for key in kept:
                kept[key] += str((call.get("function") or {}).get(key) or "")
        for key, value in delta.items():
            if isinstance(value, str):
                texts[key] = texts.get(key, "") + value
    return {**texts, "tool_calls": [{"function": made} for made in calls.values()]}
