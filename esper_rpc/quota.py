from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from .config import Range, validate
from .errors import ResourceExhausted

IDENTITIES_KEPT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaConfig:
    """What one identity may ask of one server."""

    calls_per_second: Annotated[float, Range(1, 1_000_000)] = 5_000.0
    burst: Annotated[int, Range(1, 1_000_000)] = 5_000
    """Calls that may come at once after a quiet time."""
    streams: Annotated[int, Range(1, 100_000)] = 64
    """Streams open at the same time."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(slots=True)
class _Account:
    tokens: float
    updated: float
    streams: int = 0


class Quotas:
    """A token bucket and a count of streams per identity; a member that floods slows down itself alone."""

    def __init__(self, config: QuotaConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config or QuotaConfig()
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def take(self, identity: str) -> None:
        """Count a call; raises ResourceExhausted with the time until the next one."""
        account = self._account(identity)
        if account.tokens < 1:
            wait_ms = max(1, int((1 - account.tokens) / self._config.calls_per_second * 1000))
            raise ResourceExhausted(
                f"{identity} makes more than {self._config.calls_per_second:g} calls a second.",
                reason="QUOTA_CALLS",
                retry_after_ms=wait_ms,
            )
        account.tokens -= 1

    def open_stream(self, identity: str) -> None:
        """Count a stream until `close_stream`; raises ResourceExhausted."""
        account = self._account(identity)
        if account.streams >= self._config.streams:
            raise ResourceExhausted(
                f"{identity} has {account.streams} streams open; close one first.",
                reason="QUOTA_STREAMS",
                retry_after_ms=1000,
            )
        account.streams += 1

    def close_stream(self, identity: str) -> None:
        """Take back what `open_stream` counted."""
        self._account(identity).streams -= 1

    def _account(self, identity: str) -> _Account:
        now = self._clock()
        account = self._accounts.get(identity)
        if account is None:
            account = self._accounts[identity] = _Account(self._config.burst, now)
            self._forget_idle()
        earned = (now - account.updated) * self._config.calls_per_second
        account.tokens, account.updated = min(self._config.burst, account.tokens + earned), now
        self._accounts.move_to_end(identity)
        return account

    def _forget_idle(self) -> None:
        while len(self._accounts) > IDENTITIES_KEPT:
            identity, account = next(iter(self._accounts.items()))
            if account.streams:
                self._accounts.move_to_end(identity)
            else:
                del self._accounts[identity]
