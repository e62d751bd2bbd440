from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

KEPT_STEPS = 256


@dataclass(frozen=True, slots=True)
class StepSample:
    """What was measured in a step."""

    global_step: int
    epoch: int
    metrics: Mapping[str, float]
    ended_at_ns: int


class MetricsFeed:
    """Hands the metrics of steps to whoever watches. Publishing costs nothing while nobody does, and never waits."""

    def __init__(self) -> None:
        self._readers: tuple[_Reader, ...] = ()
        self._is_closed = False

    @property
    def is_watched(self) -> bool:
        """Whether anybody reads."""
        return bool(self._readers)

    def publish(self, global_step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Hand a step over, on the training thread."""
        if not self._readers:
            return
        sample = StepSample(global_step, epoch, dict(metrics), time.time_ns())
        for reader in self._readers:
            reader.put(sample)

    async def watch(self, every_steps: int = 1) -> AsyncIterator[tuple[StepSample, int]]:
        """Yield each step from now on whose number is a multiple, with how many were left out just before it."""
        if self._is_closed:
            return
        reader = _Reader(asyncio.get_running_loop(), max(1, every_steps))
        self._readers = (*self._readers, reader)
        try:
            while (found := await reader.take()) is not None:
                yield found
        finally:
            self._readers = tuple(each for each in self._readers if each is not reader)

    def close(self) -> None:
        """End those who watch."""
        self._is_closed = True
        for reader in self._readers:
            reader.put(None)


class _Reader:
    def __init__(self, loop: asyncio.AbstractEventLoop, every_steps: int) -> None:
        self._loop = loop
        self._every = every_steps
        self._lock = threading.Lock()
        self._waiting: deque[StepSample | None] = deque()
        self._missed = 0
        self._arrived = asyncio.Event()

    def put(self, sample: StepSample | None) -> None:
        if sample is not None and sample.global_step % self._every:
            return
        with self._lock:
            if len(self._waiting) >= KEPT_STEPS:
                self._waiting.popleft()
                self._missed += 1
            self._waiting.append(sample)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> tuple[StepSample, int] | None:
        while True:
            with self._lock:
                if self._waiting:
                    sample, missed, self._missed = self._waiting.popleft(), self._missed, 0
                    return None if sample is None else (sample, missed)
                self._arrived.clear()
            await self._arrived.wait()
