"""Verdicts for the routes: cached, batched, and closed where anything goes wrong."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from beavertails_v.errors import UserError
from guard.items import FAULTS
from guard.server.content import RequestError, Turn, asked_of
from guard.server.metrics import Metrics
from guard.server.pool import NotDone, Pool, QueueFull
from guard.server.settings import ServeSettings
from guard.server.work import Item
from guard.types import Kind, Verdict, fail_closed, fail_open


class Busy(UserError, RuntimeError):
    """The queue is full: try again later."""


class Moderator:
    """Judges items and conversations. pool: of guards."""

    def __init__(self, pool: Pool, settings: ServeSettings, metrics: Metrics) -> None:
        self.pool, self.settings, self.metrics = pool, settings, metrics
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()

    @property
    def info(self) -> Mapping[str, Any]:
        return self.pool.info or {}

    def can_judge(self, kind: Kind) -> bool:
        return kind in self.info.get("kinds", ())

    async def judge(self, item: Item, where: str = "input") -> Verdict:
        """The verdict on one item. Raises RequestError where its content is at fault, Busy where too many wait."""
        if not self.can_judge(item.kind):
            raise RequestError(
                f"this guard was not trained to judge a {item.kind}; it judges {', '.join(self.info['kinds'])}", where
            )
        key = item.key()
        if (known := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            self.metrics.cache_hits.inc()
            self.metrics.verdict(known)
            return known
        verdict = await self._asked(item, where)
        self.metrics.verdict(verdict)
        if not verdict.degraded and self.settings.verdict_cache:
            self._cache[key] = verdict
            while len(self._cache) > self.settings.verdict_cache:
                self._cache.popitem(last=False)
        return verdict

    async def judge_all(self, items: Sequence[Item], wheres: Sequence[str]) -> list[Verdict]:
        """A verdict an item, in order. Where one cannot be taken, the first such error is raised when all are done."""
        return await _all([self.judge(item, where) for item, where in zip(items, wheres, strict=True)])

    async def judge_query(self, turns: Sequence[Turn]) -> Verdict:
        """A conversation up to now: every turn by itself and all of them together; the strictest verdict."""
        turns = [turn for turn in turns if turn.text.strip() or turn.pictures]
        parts = [turn for turn in turns if len(turns) > 1]
        singles = [self.judge(Item(t.text, t.pictures), "messages") for t in parts]
        *verdicts, whole = await _all([*singles, self._together(turns)])
        return max([whole, *verdicts], key=Verdict.strictness)

    async def _together(self, turns: Sequence[Turn]) -> Verdict:
        """The turns as one text; where that is longer than the guard reads, each half of them, one turn in both."""
        asked = asked_of(turns)
        verdict = await self.judge(Item(asked.text, asked.pictures), "messages")
        if not verdict.truncated or len(turns) < 2:
            return verdict
        if len(turns) == 2:  # each was judged by itself
            return max(
                await _all([self.judge(Item(t.text, t.pictures), "messages") for t in turns]), key=Verdict.strictness
            )
        middle = len(turns) // 2
        return max(
            await _all([self._together(turns[: middle + 1]), self._together(turns[middle:])]), key=Verdict.strictness
        )

    async def judge_response(self, turns: Sequence[Turn], response: str, where: str = "response") -> Verdict:
        """An answer to the last turn, and to the whole conversation as far back as the guard can read."""
        turns = [turn for turn in turns if turn.text.strip() or turn.pictures]
        pictures = tuple(p for t in turns for p in t.pictures)
        last = Item(turns[-1].text, pictures, response)
        verdicts = [await self.judge(last, where)]
        if verdicts[0].truncated and pictures != turns[-1].pictures:
            verdicts = [await self.judge(Item(turns[-1].text, turns[-1].pictures, response), where)]
        begin = 0
        while len(turns) > 1 and begin < len(turns) - 1:
            asked = asked_of(turns[begin:])
            verdict = await self.judge(Item(asked.text, asked.pictures, response), where)
            if not verdict.truncated:
                verdicts.append(verdict)
                break
            begin += max(1, (len(turns) - begin) // 2)
        return max(verdicts, key=Verdict.strictness)

    async def _asked(self, item: Item, where: str) -> Verdict:
        pixels = sum(len(picture.encoded()) for picture in item.pictures)
        size = round(2 * math.log2(1 + len(item.text) / 4 + len(item.response or "") / 4 + pixels / 256))
        try:
            future = self.pool.submit(item, size)
        except QueueFull as error:
            raise Busy(str(error)) from None
        except NotDone as error:
            return self._not_judged(item.kind, str(error))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.settings.timeout_s + 1.0)  # type: ignore[no-any-return]
        except FAULTS as error:
            raise RequestError(f"{where}: {error}", where, code="invalid_content") from None
        except (NotDone, TimeoutError) as error:
            return self._not_judged(item.kind, str(error) or "no verdict in time")

    def _not_judged(self, kind: Kind, why: str) -> Verdict:
        calibration_id = self.info.get("calibration_id", "none")
        if self.settings.fail_open:
            return fail_open(kind, f"not judged: {why}", calibration_id=calibration_id)
        categories = tuple(self.info.get("categories", ()))
        return fail_closed(kind, f"not judged: {why}", categories, calibration_id=calibration_id)


async def _all(asked: Sequence[Any]) -> list[Verdict]:
    """All of them, also where one fails: none is left running alone."""
    found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found
