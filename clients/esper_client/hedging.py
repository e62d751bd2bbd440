from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from esper_rpc.config import Range, validate

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class HedgeConfig:
    """When a read that is slow is asked a second time."""

    after_seconds: Annotated[float, Range(0.001, 60)] = 0.02
    ratio: Annotated[float, Range(0, 1)] = 0.1
    """How many of all reads may be asked twice: a server that is slow for everyone must not get twice the load."""

    def __post_init__(self) -> None:
        validate(self)


class Hedge:
    """Asks an idempotent read a second time when the first answer is late, and takes whichever comes first."""

    def __init__(self, config: HedgeConfig | None = None) -> None:
        self._config = config or HedgeConfig()
        self._tokens = 1.0
        self.hedged = 0

    async def first(self, ask: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Return the first answer; raises what the last attempt raised when none succeeds."""
        self._tokens = min(10.0, self._tokens + self._config.ratio)
        attempts = {asyncio.create_task(ask())}
        try:
            done, _ = await asyncio.wait(attempts, timeout=self._config.after_seconds)
            if not done and self._tokens >= 1:
                self._tokens -= 1
                self.hedged += 1
                attempts.add(asyncio.create_task(ask()))
            return await _first_success(attempts)
        finally:
            for attempt in attempts:
                attempt.cancel()


async def _first_success(attempts: set[asyncio.Task[Result]]) -> Result:
    pending = set(attempts)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for attempt in done:
            if attempt.exception() is None or not pending:
                return attempt.result()
