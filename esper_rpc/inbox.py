from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Generic, Self, TypeVar

Request = TypeVar("Request")

CAPACITY = 64
LINGER_SECONDS = 1.0
A_DAY = 86_400.0


class Inbox(Generic[Request]):
    """The requests of one stream, and the server's wish to end it, in one queue.

    Iterating gives requests, and None once when the client should be told to go elsewhere; it ends with the stream, or
    a moment after that None. A client that floods is held back by flow control: the queue is bounded.
    """

    def __init__(
        self,
        requests: AsyncIterable[Request],
        *,
        leave_after_seconds: float = A_DAY,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._requests = requests
        self._leave_after_seconds = min(leave_after_seconds, A_DAY)
        self._linger_seconds = linger_seconds
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue(CAPACITY)
        self._leaving = False
        self._ended = False

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        self._timer = asyncio.get_running_loop().call_later(self._leave_after_seconds, self.leave)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        self._reader.cancel()

    def leave(self) -> None:
        """Have the client told to go elsewhere, and end soon after; call it on the loop."""
        if not self._leaving:
            self._leaving = True
            self._wake()

    async def __aiter__(self) -> AsyncIterator[Request | None]:
        has_told = False
        while not (self._ended and self._queue.empty()):
            request = await self._queue.get()
            if self._leaving and not has_told:
                has_told = True
                asyncio.get_running_loop().call_later(self._linger_seconds, self._reader.cancel)
                yield None
            if request is not None:
                yield request

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                await self._queue.put(request)
        finally:
            self._ended = True
            self._wake()

    def _wake(self) -> None:
        # A full queue wakes whoever reads it anyway.
        if not self._queue.full():
            self._queue.put_nowait(None)
