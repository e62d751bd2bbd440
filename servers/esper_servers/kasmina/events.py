from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator

from esper_rpc.errors import ResourceExhausted
from esper_rpc.proto.kasmina.v1 import SeedEvent

BACKLOG = 1024


class SeedEvents:
    """Hands events of the training thread to readers on event loops. A slow reader is ended, never waited for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: set[Reader] = set()
        self._is_closed = False

    def publish(self, event: SeedEvent) -> None:
        """Give an event to every reader; any thread."""
        with self._lock:
            for reader in self._readers:
                reader.offer(event)

    def close(self) -> None:
        """End every reader, after what it has not read yet."""
        with self._lock:
            self._is_closed = True
            for reader in self._readers:
                reader.end()

    def open(self) -> Reader:
        """Start a reader on the running event loop; it gets what is published from here on."""
        reader = Reader(asyncio.get_running_loop())
        with self._lock:
            self._readers.add(reader)
            if self._is_closed:
                reader.end()
        return reader

    def forget(self, reader: Reader) -> None:
        """Stop handing events to a reader."""
        with self._lock:
            self._readers.discard(reader)


class Reader:
    """The events that one subscriber has not read yet, at most 1024."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._backlog: deque[SeedEvent] = deque()
        self._wake = asyncio.Event()
        self._overflowed = self._ended = False

    def offer(self, event: SeedEvent) -> None:
        """Add an event, or mark the reader as too slow."""
        if len(self._backlog) >= BACKLOG:
            self._overflowed = True
        else:
            self._backlog.append(event)
        self._rouse()

    def end(self) -> None:
        """Let the reader finish with what it has."""
        self._ended = True
        self._rouse()

    def _rouse(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def events(self) -> AsyncIterator[SeedEvent]:
        """Yield events in order, each once.

        Raises:
            ResourceExhausted: After falling 1024 events behind.
        """
        while True:
            self._wake.clear()
            if self._overflowed:
                raise ResourceExhausted(f"This reader fell {BACKLOG} events behind; start again.")
            while self._backlog:
                yield self._backlog.popleft()
            if self._ended:
                return
            await self._wake.wait()
