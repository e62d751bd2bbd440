from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable

import structlog

from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import TelemetryPacket
from esper_rpc.proto.tamiyo.v1 import DumpedStep, StepDump
from esper_rpc.telemetry.events import EMERGENCY_LANE, PRIORITY_OF, listen
from esper_servers.tamiyo.giving_way import giving_way
from esper_servers.tamiyo.risk.events import SOURCE

from .dump_journal import DumpJournal
from .flight_recorder import AnsweredStep, FlightRecorder, Noted

log = structlog.get_logger(__name__)

LEAST_SECONDS = 60.0
"""From the start of one dump to that of the next."""
PART_STEPS = 32
PART_BYTES = 256 * 1024


class StepDumps:
    """Writes down what the flight recorder holds, after an event of Tamiyo of priority HIGH or CRITICAL.

    A dump holds what no dump before it holds. Events that come before the next dump may begin share that one. What the
    disk does not take stays with the recorder for the next. `catch_up` is a chore: do it again and again.
    """

    def __init__(
        self,
        recorder: FlightRecorder,
        journal: DumpJournal,
        *,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._recorder = recorder
        self._journal = journal
        self._clock = clock
        self._clock_ns = clock_ns
        self._not_before = -float("inf")
        self._dumped = 0
        """How many of the steps that the recorder has seen are in a dump, or gone."""
        self._lock = threading.Lock()
        self._first: TelemetryPacket | None = None
        self._events = 0
        self._one_at_a_time = asyncio.Lock()
        self.stop_listening = listen(self.note)

    @classmethod
    def of(cls, recorder: FlightRecorder, journal: Journal, *, clock_ns: Callable[[], int]) -> StepDumps:
        """Keep dumps in a journal."""
        return cls(recorder, DumpJournal(journal), clock_ns=clock_ns)

    def note(self, packet: TelemetryPacket) -> None:
        """Take note of an event, on any thread; returns at once."""
        if packet.source_subsystem == SOURCE and PRIORITY_OF[packet.level] in EMERGENCY_LANE:
            with self._lock:
                self._first = self._first or packet
                self._events += 1

    async def catch_up(self) -> None:
        """Write the dump that is due, if one is."""
        # A caller that gives up must not end it in the middle.
        await asyncio.shield(asyncio.create_task(self._catch_up()))

    async def close(self) -> None:
        """Write what waits for its time, and listen no more."""
        self.stop_listening()
        self._not_before = -float("inf")
        await self._catch_up()

    async def page(self, size: int, token: str) -> tuple[list[StepDump], str]:
        """Return dumps, oldest first, and the token of the next page; raises InvalidRequest."""
        await self.catch_up()
        return await asyncio.to_thread(self._journal.page, size, token)

    async def steps(self, dump_id: str, size: int, token: str) -> tuple[list[DumpedStep], str]:
        """Return steps of a dump, oldest first, and the token of the next page; raises NotFound and InvalidRequest."""
        with giving_way():
            return await asyncio.to_thread(self._journal.steps, dump_id, size, token)

    async def _catch_up(self) -> None:
        async with self._one_at_a_time:
            if self._first is None or self._clock() < self._not_before:
                return
            steps, seen = self._recorder.since(self._dumped), self._recorder.noted
            self._dumped = seen - len(steps)
            packet, events = self._take()
            if not steps:
                return
            self._not_before = self._clock() + LEAST_SECONDS
            try:
                await self._dump(self._head(packet, events, len(steps)), steps)
            finally:
                if self._dumped < seen:
                    self._put_back(packet, events)

    def _take(self) -> tuple[TelemetryPacket, int]:
        with self._lock:
            packet, events = self._first, self._events
            self._first, self._events = None, 0
        assert packet is not None
        return packet, events

    def _put_back(self, packet: TelemetryPacket, events: int) -> None:
        """Have the next dump stand for these events too, and for those that came meanwhile."""
        with self._lock:
            self._first = packet
            self._events += events

    async def _dump(self, dump: StepDump, steps: deque[Noted]) -> None:
        with giving_way():
            written = await self._write(dump, steps)
        told = {"dump_id": dump.dump_id, "steps": dump.steps, "cause": dump.event, "reason": dump.reason}
        if written < dump.steps:
            log.warning("step_dump_failed", **told, written=written, priority="HIGH")
        else:
            log.info("steps_dumped", **told)

    def _head(self, packet: TelemetryPacket, events: int, steps: int) -> StepDump:
        (event,) = packet.events
        dump = StepDump(
            dump_id=str(uuid.uuid4()), event=event.description, reason=event.attributes.get("reason", ""),
            level=packet.level, run_id=event.attributes.get("run_id", ""), triggered_at=packet.timestamp,
            events=events, steps=steps,
        )  # fmt: skip
        dump.dumped_at.FromNanoseconds(self._clock_ns())
        return dump

    async def _write(self, dump: StepDump, steps: deque[Noted]) -> int:
        """Write part after part; returns how many steps the disk took."""
        written = 0
        while steps:
            part = _part(steps)
            if not await asyncio.to_thread(self._journal.add, dump, part, written=written):
                return written
            written += len(part)
            self._dumped += len(part)
        await asyncio.to_thread(self._journal.prune)
        return written


def _part(steps: deque[Noted]) -> list[AnsweredStep]:
    """Take as many as are written at once: more would keep the interpreter from the steps for longer."""
    part: list[AnsweredStep] = []
    size = 0
    while steps and len(part) < PART_STEPS and size < PART_BYTES:
        part.append(AnsweredStep._make(steps.popleft()))
        size += part[-1].size
    return part
