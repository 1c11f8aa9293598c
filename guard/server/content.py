"""What a request holds: texts and pictures, taken in strictly. Everything that cannot be judged is an error, no part is
passed over: a guard that does not look at a part must not answer for it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from beavertails_v.errors import UserError
from beavertails_v.images import ImageError, Picture
from beavertails_v.references import short
from guard.server.settings import ServeSettings

_DATA = re.compile(r"data:image/(?:png|jpe?g|webp|gif|bmp|x-ms-bmp);base64,", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
Fetch = Callable[[str], Awaitable[bytes]]


class RequestError(UserError, ValueError):
    """A request is not valid. param: the field at fault. status: of the answer."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, or one input of a moderation."""

    role: str
    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(slots=True)
class Reader:
    """Takes the content of one request in, and counts it. fetch: of remote pictures."""

    settings: ServeSettings
    fetch: Fetch
    parts: int = field(default=0)
    pictures: int = field(default=0)

    async def inputs(self, value: Any) -> list[tuple[Turn, str]]:
        """The inputs of a moderation and where each stands: a string, a list of strings, or ONE list of parts."""
        if isinstance(value, str):
            return [(Turn("user", self._text(value, "input")), "input")]
        if not isinstance(value, list) or not value:
            raise RequestError("input is a string, a list of strings, or a list of text and image_url parts", "input")
        if all(isinstance(one, str) for one in value):
            return [(Turn("user", self._text(one, f"input[{i}]")), f"input[{i}]") for i, one in enumerate(value)]
        return [(await self.turn("user", value, "input"), "input")]

    async def turn(self, role: str, content: Any, where: str) -> Turn:
        """A message's content: text, or a list of parts. Raises RequestError."""
        if content is None:
            return Turn(role, "")
        if isinstance(content, str):
            return Turn(role, self._text(content, where))
        if not isinstance(content, list):
            raise RequestError(f"{where} is neither text nor a list of parts", where)
        texts, pictures = [], []
        for i, part in enumerate(content):
            at = f"{where}[{i}]"
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise RequestError(f"{at} is not a part with a type, such as text or image_url", at)
            if part["type"] in _TEXT_PARTS:
                texts.append(self._text(part.get(_TEXT_PARTS[part["type"]]), at))
            elif part["type"] in ("image_url", "input_image"):
                pictures.append(await self._picture(part.get("image_url"), at))
            else:
                raise RequestError(
                    f"{at} is of type {short(part['type'])!r}, which is not judged here; texts and pictures are",
                    at,
                    code="unsupported_content",
                )
        return Turn(role, "\n".join(t for t in texts if t), tuple(pictures))

    async def messages(self, value: Any, where: str = "messages") -> list[Turn]:
        """Every message of a conversation, whatever its role, with the text of its tool calls."""
        if not isinstance(value, list) or not value:
            raise RequestError(f"{where} is a list with at least one message", where)
        turns = []
        for i, message in enumerate(value):
            at = f"{where}[{i}]"
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"{at} is not a message with a role", at)
            turn = await self.turn(message["role"], message.get("content"), f"{at}.content")
            said = [turn.text, *self.spoken(message, at)]
            turns.append(Turn(turn.role, "\n".join(t for t in said if t), turn.pictures))
        if not any(turn.text.strip() or turn.pictures for turn in turns):
            raise RequestError(f"{where} holds neither text nor a picture", where)
        return turns

    def spoken(self, message: Mapping[str, Any], where: str) -> list[str]:
        """Text that a message holds beside its content: a name, a refusal, reasoning, the calls of tools."""
        found = []
        for key in ("refusal", "reasoning_content", "reasoning", "name"):
            if message.get(key):
                found.append(_words(self._text(message[key], f"{where}.{key}")))
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls is not a list", f"{where}.tool_calls")
        for call in [*calls, *([{"function": message["function_call"]}] if message.get("function_call") else [])]:
            made = call.get("function") or call.get("custom") if isinstance(call, Mapping) else None
            if not isinstance(made, Mapping):
                raise RequestError(f"{where}.tool_calls holds a call that is none", f"{where}.tool_calls")
            texts = [made.get(key) for key in ("name", "arguments", "input")]
            found += [_words(self._text(text, f"{where}.tool_calls")) for text in texts if text]
        return found

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise RequestError(f"{where} is not text", where)
        self._count(where)
        if len(value) > self.settings.max_text_chars:
            raise RequestError(
                f"{where} has {len(value):,} characters; at most {self.settings.max_text_chars:,} are taken",
                where,
                413,
                "too_large",
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{where} holds half a character (a lone surrogate); it is not UTF-8", where) from None
        return value

    async def _picture(self, value: Any, where: str) -> Picture:
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise RequestError(f"{where}.image_url.url is not text", where)
        self._count(where)
        self.pictures += 1
        if self.pictures > self.settings.max_pictures:
            raise RequestError(f"{where}: more than {self.settings.max_pictures} pictures in a request", where)
        limits = self.settings.picture.limits()
        data = await self.fetch(url) if url[:4].lower() == "http" else self._decoded(url, where, limits.max_bytes)
        picture = Picture.from_bytes(data, limits=limits)
        try:
            picture.check(full=False)
        except ImageError as error:
            raise RequestError(f"{where}: {error}", where, code="invalid_image") from None
        return picture

    def _decoded(self, url: str, where: str, most: int) -> bytes:
        found = _DATA.match(url)
        if not found:
            raise RequestError(
                f"{where}: {short(url)!r} is no picture: give data:image/png;base64,... (PNG, JPEG, WEBP, GIF or BMP)",
                where,
                code="invalid_image",
            )
        if (len(url) - found.end()) * 3 // 4 > most + 2:
            raise RequestError(f"{where}: the picture has more than {most:,} bytes", where, 413, "too_large")
        try:
            return base64.b64decode(url[found.end() :].encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise RequestError(f"{where}: the picture is not valid base64", where, code="invalid_image") from None

    def _count(self, where: str) -> None:
        self.parts += 1
        if self.parts > self.settings.max_items:
            raise RequestError(f"{where}: more than {self.settings.max_items} texts and pictures in a request", where)


def _words(text: str) -> str:
    """A name such as get_weather in words: the model reads it, so the guard does."""
    return re.sub(r"[_-]+", " ", text) if _NAME.fullmatch(text) else text


def asked_of(turns: Sequence[Turn]) -> Turn:
    """The turns as one: every text, every picture."""
    text = "\n".join(t.text for t in turns if t.text.strip())
    return Turn("user", text, tuple(p for t in turns for p in t.pictures))
