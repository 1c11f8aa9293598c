"""A cache that cannot grow: least recently used out first, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lru(Generic[T]):
    """Values by key. limit: bytes held at most, as `size` counts them; a value larger than that is not kept at all."""

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self.used = limit, 0
        self._size = size
        self._values: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> T | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: T) -> None:
        if key in self._values:
            self.used -= self._size(self._values.pop(key))
        self._values[key] = value
        self.used += self._size(value)
        while self.used > self.limit:
            self.used -= self._size(self._values.popitem(last=False)[1])
