from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import structlog

from esper_rpc.proto.leyline.v1 import FieldReport, TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import observe_report_dropped
from esper_servers.tamiyo.risk.events import SOURCE

from .config import ReportConfig
from .observations import Observation, Observations, RunClosed
from .open_windows import OpenWindows
from .report_journal import Kept, Remembered, ReportJournal
from .synthesis import synthesise
from .window import EndedWindow, JudgedCommand

log = structlog.get_logger(__name__)

SLICE = 2
"""Steps that are taken in before others get the loop again: a step is answered within 5 ms."""
MANY = 8
"""Outcomes, windows or reports that are dealt with at once."""
LOOK_UPS = 64
"""Times that windows are looked up before new steps are taken in."""
KEEP_AGAIN_SECONDS = 5.0


class ReportWriter:
    """From what steps tell to reports on the disk; `on_report` hears of each once."""

    def __init__(
        self,
        observations: Observations,
        journal: ReportJournal,
        config: ReportConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int],
        on_report: Callable[[FieldReport], None],
    ) -> None:
        self._observations = observations
        self._journal = journal
        self._most_ended = config.max_windows
        self._clock = clock
        self._clock_ns = clock_ns
        self._on_report = on_report
        self._windows = OpenWindows(epochs=config.window_epochs, capacity=config.max_windows, clock_ns=clock_ns)
        self._unknown: deque[EndedWindow] = deque()
        """Those that ended before their command was looked up."""
        self._ended: dict[str, EndedWindow] = {}
        """By command, those whose report is not on the disk."""
        self._keep_at = clock()
        self._told_lost = 0
        self._dropped: Counter[str] = Counter()
        self._one_at_a_time = asyncio.Lock()

    def restore(self, found: Remembered) -> None:
        """Go on with the windows of an earlier controller."""
        self._windows.restore(found.windows, found.traces)
        self._observations.watched |= self._windows.runs

    async def catch_up(self) -> None:
        """Take in what was seen since the last time, and write the reports that are due."""
        async with self._one_at_a_time:
            await self._take_in()
            await self._identify()
            await self._report_ended()

    async def expire(self, before_ns: int) -> None:
        """End the windows that were opened before a time."""
        async with self._one_at_a_time:
            while ended := self._windows.expire(before_ns, MANY):
                self._add(ended)
                await asyncio.sleep(0)
            self._forget_idle_runs()

    async def _take_in(self) -> None:
        while seen := list(self._observations.take(SLICE)):
            for each in seen:
                await self._take_in_one(each)
            await asyncio.sleep(0)
        self._forget_idle_runs()
        if self._observations.lost > self._told_lost:
            log.warning("field_report_observations_lost", lost=self._observations.lost - self._told_lost)
            self._told_lost = self._observations.lost
        for reason, count in self._dropped.items():
            level = TelemetryLevel.TELEMETRY_LEVEL_WARNING
            tell_event(SOURCE, "field_report_drop", level, reason=reason, count=count)
        self._dropped.clear()

    async def _take_in_one(self, seen: Observation | RunClosed) -> None:
        if isinstance(seen, RunClosed):
            while ended := self._windows.close_run(seen.run_id, MANY):
                self._add(ended)
                await asyncio.sleep(0)
            return
        before = self._windows.epoch_of(seen.run_id)
        self._windows.take_in(seen)
        for first in range(0, len(seen.outcomes), MANY):
            self._add(self._windows.note(seen.outcomes[first : first + MANY], seen))
            await asyncio.sleep(0)
        while ended := self._windows.ended(seen, MANY):
            self._add(ended)
            await asyncio.sleep(0)
        if before is not None and before != seen.epoch and (trace := self._windows.trace_of(seen.run_id)):
            self._journal.note_trace(trace)

    def _forget_idle_runs(self) -> None:
        """Watch only runs with an open window, or of which something waits to be taken in."""
        if self._observations:
            return
        for run_id in self._observations.watched - self._windows.runs:
            self._journal.forget_trace(run_id)
        self._observations.watched &= self._windows.runs

    async def _identify(self) -> None:
        """Look up the commands of new windows, a bounded number at a time."""
        for _ in range(LOOK_UPS):
            names = self._windows.unidentified(MANY)
            ended = list(itertools.islice(self._unknown, MANY))
            if not names and not ended:
                break
            wanted = {command_id for _, command_id in names} | {each.window.command_id for each in ended}
            commands = await asyncio.to_thread(self._journal.commands, wanted)
            for each in ended:
                self._unknown.popleft()
                self._name(each, commands.get(each.window.command_id))
            windows = [self._windows.identify(name, self._command(name[0], commands.get(name[1]))) for name in names]
            self._journal.note_windows([window for window in windows if window])
        self._forget_idle_runs()

    def _name(self, ended: EndedWindow, command: JudgedCommand | None) -> None:
        """Tell an ended window its command; without one it goes."""
        window = ended.window
        if command := self._command(window.run_id, command):
            self._ended[window.command_id] = replace(ended, window=replace(window, command=command))

    def _command(self, run_id: str, command: JudgedCommand | None) -> JudgedCommand | None:
        """None for a command that another run was given, and for one whose report is on its way."""
        is_told = command is None or command.run_id != run_id or command.command_id in self._ended
        return None if is_told else command

    async def _report_ended(self) -> None:
        """Write reports; a disk that does not take them is tried again after a while."""
        while self._ended and self._clock() >= self._keep_at:
            ended = list(itertools.islice(self._ended.values(), MANY))
            kept = await asyncio.to_thread(self._write, ended)
            for command_id in kept.commands:
                self._ended.pop(command_id, None)
            if len(kept.commands) < len(ended):
                self._keep_at = self._clock() + KEEP_AGAIN_SECONDS
            for report in kept.new:
                self._on_report(report)
                await asyncio.sleep(0)

    def _write(self, ended: Sequence[EndedWindow]) -> Kept:
        return self._journal.keep([synthesise(each, self._clock_ns()) for each in ended])

    def _add(self, ended: Iterable[EndedWindow]) -> None:
        """Keep windows for their report. When there are too many those whose command is not known go first."""
        for each in ended:
            if each.window.command is None:
                self._unknown.append(each)
            else:
                self._ended[each.window.command_id] = each
        while len(self._unknown) + len(self._ended) > self._most_ended:
            self._drop_one()

    def _drop_one(self) -> None:
        reason = "unknown" if self._unknown else "disk"
        if self._unknown:
            self._unknown.popleft()
        else:
            del self._ended[next(iter(self._ended))]
        observe_report_dropped(reason)
        self._dropped[reason] += 1
