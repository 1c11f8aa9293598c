"""Guarded answers: the question is judged while a first answer is made, every choice is judged, flagged ones are made
anew up to so many rounds, and what is left is refused. A deadline and a token budget end it all in the refusal.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guard.server.content import Reader, Turn
from guard.server.moderator import Moderator
from guard.server.shapes import ChatRequest, summary
from guard.server.upstream import Upstream
from guard.types import Verdict


@dataclass(slots=True)
class Choice:
    """One choice of the answer with everything that was tried for it."""

    index: int
    message: dict[str, Any] | None = None
    finish_reason: str = "stop"
    verdicts: list[Verdict] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    outcome: str = "open"

    @property
    def open(self) -> bool:
        """Whether nothing was decided yet."""
        return self.outcome == "open"


@dataclass(slots=True)
class Conversation:
    """A request on its way through the loop."""

    body: dict[str, Any]
    options: Any
    turns: list[Turn]
    begin: float = field(default_factory=time.monotonic)
    query: Verdict | None = None
    tokens: int = 0
    answer: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)


class Loop:
    """Answers chat requests through the guard. log: takes every attempt, where that is asked for."""

    def __init__(self, moderator: Moderator, upstream: Upstream, log: Any = None) -> None:
        self.moderator, self.upstream, self.log = moderator, upstream, log
        self.settings = moderator.settings

    async def begin(self, request: ChatRequest, reader: Reader) -> Conversation:
        """Takes the request in. Raises RequestError."""
        turns = await reader.messages(request.messages)
        body = request.model_dump(exclude={"guard"}, exclude_none=True)
        return Conversation(body=body, options=request.guard, turns=turns)

    async def answer(self, talk: Conversation) -> dict[str, Any]:
        """The whole answer in OpenAI's shape, with `guard` beside it."""
        choices = [Choice(i) for i in range(int(talk.body.get("n") or 1))]
        try:
            await asyncio.wait_for(self._rounds(talk, choices), self._deadline(talk))
        except TimeoutError:
            self._end(choices, "deadline")
        return self._answered(talk, choices)

    def _deadline(self, talk: Conversation) -> float:
        most = self.settings.guard.deadline_s
        return min(most, talk.options.deadline_s or most)

    async def _rounds(self, talk: Conversation, choices: Sequence[Choice]) -> None:
        loop = self.settings.guard
        rounds = loop.rounds if talk.options.rounds is None else min(talk.options.rounds, loop.rounds)
        if not await self._first(talk, choices):
            return
        for _ in range(rounds):
            left = [choice for choice in choices if choice.open]
            if not left:
                return
            if talk.tokens >= loop.max_total_tokens:
                self._end(left, "token_budget")
                return
            await self._attempt(talk, left, self._again(talk, left[0]))
        self._end(choices, "gave_up")

    async def _first(self, talk: Conversation, choices: Sequence[Choice]) -> bool:
        """The question judged beside the first attempt; whether there is anything to go on with."""
        asked: asyncio.Task[Any] | None = None
        if self.moderator.can_judge("query"):
            asked = asyncio.ensure_future(self.moderator.judge_query(talk.turns))
        first = asyncio.ensure_future(self.upstream.complete(talk.body))
        try:
            if asked is not None:
                talk.query = await asked
                if talk.query.action == "refuse":
                    self._end(choices, "query_refused")
                    return False
            await self._judge(talk, choices, await first)
        finally:
            for task in filter(None, (asked, first)):
                task.cancel()
            await asyncio.gather(*filter(None, (asked, first)), return_exceptions=True)
        return True

    def _again(self, talk: Conversation, choice: Choice) -> dict[str, Any]:
        """The request of a new attempt: warm enough to differ, and told what was wrong where that is wanted."""
        body = {k: v for k, v in talk.body.items() if k != "seed"}
        body["temperature"] = max(body.get("temperature", 1.0), self.settings.guard.retry_temperature)
        if (talk.options.feedback or self.settings.guard.feedback) == "guided" and choice.verdicts:
            body["messages"] = [*body["messages"], {"role": "system", "content": feedback(choice.verdicts[-1])}]
        return body

    async def _attempt(self, talk: Conversation, left: Sequence[Choice], body: dict[str, Any]) -> None:
        await self._judge(talk, left, await self.upstream.complete(body | {"n": len(left)}))

    async def _judge(self, talk: Conversation, choices: Sequence[Choice], answer: dict[str, Any]) -> None:
        """Judge what came for each choice. One that did not come stays open."""
        self._count(talk, answer)
        messages = [(c.get("message") or {}, str(c.get("finish_reason") or "stop")) for c in answer["choices"]]
        came = list(zip(choices, messages, strict=False))
        texts = [self.text_of(message) for _, (message, _) in came]
        verdicts = await asyncio.gather(*(self._verdict(talk, text) for text in texts))
        for (choice, (message, reason)), text, verdict in zip(came, texts, verdicts, strict=True):
            choice.verdicts.append(verdict)
            choice.texts.append(text)
            if verdict.action == "allow":
                choice.outcome, choice.message, choice.finish_reason = "answered", dict(message), reason
            elif verdict.action == "refuse":
                choice.outcome = "response_refused"

    async def _verdict(self, talk: Conversation, text: str) -> Verdict:
        return await self.moderator.judge_response(talk.turns, text, "the model's answer")

    def text_of(self, message: Mapping[str, Any]) -> str:
        """All that a message says, the calls of tools included."""
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        said = [str(p.get("text", "")) if isinstance(p, Mapping) else str(p or "") for p in parts]
        reader = Reader(self.settings, self._no_fetch)
        return "\n".join(filter(None, [*said, *reader.spoken(message, "the model's answer")]))

    @staticmethod
    async def _no_fetch(url: str) -> bytes:
        raise RuntimeError("an answer's pictures are not fetched")

    def _count(self, talk: Conversation, answer: Mapping[str, Any]) -> None:
        talk.answer = dict(answer)
        usage = answer.get("usage") or {}
        for key, value in usage.items():
            if isinstance(value, int):
                talk.usage[key] = talk.usage.get(key, 0) + value
        texts = [self.text_of(c.get("message") or {}) for c in answer["choices"]]
        talk.tokens += int(usage.get("completion_tokens") or sum(len(t) // 4 for t in texts))

    @staticmethod
    def _end(choices: Sequence[Choice], outcome: str) -> None:
        for choice in choices:
            if choice.open:
                choice.outcome = outcome

    def _answered(self, talk: Conversation, choices: Sequence[Choice]) -> dict[str, Any]:
        refusal = str(self.moderator.info.get("refusal", "I can't help with that request."))
        shown = []
        for choice in choices:
            self.moderator.metrics.outcomes.labels(choice.outcome).inc()
            self.moderator.metrics.rounds.observe(max(0, len(choice.verdicts) - 1))
            given = choice.outcome == "answered"
            message = choice.message if given else {"role": "assistant", "content": refusal, "refusal": None}
            reason = choice.finish_reason if given else "content_filter"
            shown.append({"index": choice.index, "message": message, "finish_reason": reason, "logprobs": None})
        self._write(talk, choices)
        head = {k: v for k, v in talk.answer.items() if k not in ("choices", "usage")}
        head = {
            "id": f"chatcmpl-{time.time_ns():x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": str(talk.body.get("model") or "guarded"),
        } | head
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0) | talk.usage
        return head | {"choices": shown, "usage": usage, "guard": self.report(talk, choices)}

    def report(self, talk: Conversation, choices: Sequence[Choice]) -> dict[str, Any]:
        """What the guard did: rounds, outcome and verdicts of every choice, and the question's."""
        reasons = bool(self.settings.reasons if talk.options.reasons is None else talk.options.reasons)
        found = [
            {
                "index": choice.index,
                "outcome": choice.outcome,
                "rounds": max(0, len(choice.verdicts) - 1),
                "verdicts": [
                    summary(v, reasons=reasons)
                    for v in (choice.verdicts if talk.options.attempts else choice.verdicts[-1:])
                ],
            }
            for choice in choices
        ]
        query = None if talk.query is None else summary(talk.query, reasons=reasons)
        verdicts = [v for one in found for v in one["verdicts"]]  # type: ignore[attr-defined]
        rounds = max(len(choice.verdicts) - 1 for choice in choices)
        return {"rounds": max(0, rounds), "verdicts": verdicts, "query": query, "choices": found}

    def _write(self, talk: Conversation, choices: Sequence[Choice]) -> None:
        if self.log is None:
            return
        row = {
            "time": time.time(),
            "turns": [{"role": t.role, "text": t.text, "pictures": [p.sha256 for p in t.pictures]} for t in talk.turns],
            "query": None if talk.query is None else talk.query.to_dict(),
            "choices": [
                {
                    "outcome": c.outcome,
                    "attempts": [
                        {"text": text, "verdict": v.to_dict()} for text, v in zip(c.texts, c.verdicts, strict=True)
                    ],
                }
                for c in choices
            ],
        }
        self.log.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.log.flush()


def feedback(verdict: Verdict) -> str:
    """What a new attempt is told of the one before: how grave and of what kind, never its words."""
    kind = f" in the category {verdict.top_category.replace('_', ' ')}" if verdict.top_category else ""
    level = f"{verdict.severity.name.lower()} harm" if verdict.severity else "harm"
    return (
        f"An answer to this was withheld: it was judged to hold {level}{kind}. "
        "Answer again without it; decline what cannot be answered safely."
    )
