from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class _Entry(NamedTuple):
    content: object
    size: int
    expires_at: float


class TimedLru(Generic[Value]):
    """Keeps what was used last, up to a number of entries and of bytes, each for a limited time.

    Every operation is O(1), forgetting what has expired O(1) for each such entry. For use under the lock of its owner.
    """

    def __init__(self, *, entries: int, ttl_seconds: float, clock: Callable[[], float], size_bytes: int = 0) -> None:
        self._most = entries
        self._most_bytes = size_bytes
        self._ttl = ttl_seconds
        self._clock = clock
        self._by_use: OrderedDict[str, _Entry] = OrderedDict()
        self._by_age: OrderedDict[str, None] = OrderedDict()
        self.size_bytes = 0
        """The sizes of all entries together."""
        self.evictions = 0
        """Entries that had to make room."""

    def __len__(self) -> int:
        return len(self._by_use)

    def put(self, key: str, value: Value, size: int = 0) -> None:
        """Keep a value from now on; what was used longest ago makes room."""
        self.remove(key)
        self._by_use[key] = _Entry(value, size, self._clock() + self._ttl)
        self._by_age[key] = None
        self.size_bytes += size
        while len(self._by_use) > self._most or self._is_too_big():
            self.remove(next(iter(self._by_use)))
            self.evictions += 1

    def get(self, key: str) -> Value | None:
        """Return a value that has not expired, and count that as a use."""
        self.purge()
        entry = self._by_use.get(key)
        if entry is None:
            return None
        self._by_use.move_to_end(key)
        return entry.content  # type: ignore[return-value]  # What `put` took.

    def remove(self, key: str) -> None:
        """Forget a value, if there is one."""
        entry = self._by_use.pop(key, None)
        if entry is not None:
            del self._by_age[key]
            self.size_bytes -= entry.size

    def purge(self) -> int:
        """Forget what has expired; returns how many that were."""
        now, before = self._clock(), len(self._by_use)
        # All live equally long, so that the oldest expires first.
        while self._by_age and self._by_use[next(iter(self._by_age))].expires_at <= now:
            self.remove(next(iter(self._by_age)))
        return before - len(self._by_use)

    def clear(self) -> int:
        """Forget everything; returns how many entries that were."""
        count = len(self._by_use)
        self._by_use.clear()
        self._by_age.clear()
        self.size_bytes = 0
        return count

    def _is_too_big(self) -> bool:
        return bool(self._most_bytes) and self.size_bytes > self._most_bytes
