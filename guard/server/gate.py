"""What every request passes before a route sees it: keys, rates, size and form of its body, and a server that stops."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from beavertails_v.errors import UserError
from guard.server.metrics import Metrics
from guard.server.settings import ServeSettings
from guard.server.shapes import error

KEYS = "SAFE_RLHF_V_API_KEYS"
OPEN = ("/healthz",)
_STRING, _BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"'), re.compile(r"[\[\]{}]")
_LARGE = 2**20  # bytes of a body that is looked at in a thread of its own
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Refused(UserError):
    """The request ends here."""

    def __init__(self, status: int, message: str, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or {}


class Rates:
    """A bucket of tokens a key: `per_minute` requests, all of which may come at once after a quiet minute."""

    def __init__(self, per_minute: int, most_keys: int = 10_000) -> None:
        self.per_minute, self.most_keys = per_minute, most_keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Seconds until this request may come; 0 where it may now, and is counted."""
        now = time.monotonic()
        tokens, last = self._buckets.pop(key, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + (now - last) * self.per_minute / 60)
        wait = 0.0 if tokens >= 1 else (1 - tokens) * 60 / self.per_minute
        self._buckets[key] = (tokens - (wait == 0), now)
        while len(self._buckets) > self.most_keys:
            self._buckets.popitem(last=False)
        return wait


class Gate:
    """ASGI middleware. keys: None reads SAFE_RLHF_V_API_KEYS."""

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics, keys: list[str] | None = None) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        found = os.environ.get(KEYS, "").split(",") if keys is None else keys
        self.keys = [key.strip().encode() for key in found if key.strip()]
        self.rates = Rates(settings.requests_per_minute) if settings.requests_per_minute else None
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), [500]

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._passed(scope, receive, counted)
        finally:
            self.metrics.requests.labels(_route(scope), str(status[0])).inc()
            self.metrics.seconds["request"].observe(time.monotonic() - begin)

    async def _passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in OPEN:
                self._admit(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._body(scope, receive)
        except Refused as refused:
            await _answer(send, refused)
            return
        await self.app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = {k.lower(): v for k, v in scope["headers"]}
        key = _bearer(headers.get(b"authorization", b""))
        if self.keys and not self._known(key):
            raise Refused(401, "give a key of this server as `Authorization: Bearer KEY`", "authentication_error",
                          {"www-authenticate": "Bearer"})  # fmt: skip
        if self.stopping:
            raise Refused(503, "the server is stopping", "server_error", {"retry-after": "5", "connection": "close"})
        who = key.decode("latin-1") if self.keys else str((scope.get("client") or ("",))[0])
        if self.rates is not None and (wait := self.rates.wait(who)):
            raise Refused(429, f"more than {self.settings.requests_per_minute} requests a minute", "rate_limit_error",
                          {"retry-after": str(int(wait) + 1)})  # fmt: skip

    def _known(self, key: bytes) -> bool:
        """Compared with every key, each in constant time, so that the time tells nothing."""
        return sum(hmac.compare_digest(key, known) for known in self.keys) > 0

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read within its limits and once: what the route is handed is what was looked at."""
        most = int(self.settings.max_body_mb * 2**20)
        headers = {k.lower(): v for k, v in scope["headers"]}
        if (length := headers.get(b"content-length", b"0")).isdigit() and int(length) > most:
            raise Refused(
                413, f"the body has more than {most:,} bytes", "invalid_request_error", {"connection": "close"}
            )
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(415, "send application/json", "invalid_request_error")
        data = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away", "invalid_request_error")
            data += message.get("body", b"")
            if len(data) > most:
                raise Refused(413, f"the body has more than {most:,} bytes", "invalid_request_error",
                              {"connection": "close"})  # fmt: skip
            if not message.get("more_body"):
                break
        if len(data) > _LARGE:
            await asyncio.to_thread(_require_json, bytes(data), self.settings.max_json_depth)
        else:
            _require_json(bytes(data), self.settings.max_json_depth)
        sent = [False]

        async def replay() -> MutableMapping[str, Any]:
            if not sent[0]:
                sent[0] = True
                return {"type": "http.request", "body": bytes(data), "more_body": False}
            return await receive()

        return replay


def depth_of(text: str, enough: int) -> int:
    """The deepest nesting of lists and objects in a JSON text, found without building them; stops above `enough`."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
        if deepest > enough:
            break
    return deepest


def _require_json(data: bytes, most: int) -> None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise Refused(400, f"the body is not UTF-8 (byte {fault.start})", "invalid_request_error") from None
    if text.count("[") + text.count("{") > most and depth_of(text, most) > most:
        raise Refused(400, f"the body's JSON is nested deeper than {most}", "invalid_request_error")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as fault:
        raise Refused(400, f"the body is not JSON: {str(fault)[:200]}", "invalid_request_error") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object", "invalid_request_error")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _bearer(header: bytes) -> bytes:
    word, _, key = header.partition(b" ")
    return key.strip() if word.lower() == b"bearer" else b""


def _route(scope: Scope) -> str:
    """The route's pattern; other paths share one name, or every probe would make a series of its own."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(error(str(refused), kind=refused.kind)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
