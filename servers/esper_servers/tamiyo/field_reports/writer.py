from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import structlog

from esper_rpc.proto.leyline.v1 import FieldReport
from esper_rpc.telemetry.metrics import observe_report_dropped

from .config import ReportConfig
from .observations import Observation, Observations, RunClosed
from .open_windows import OpenWindows
from .report_journal import Kept, Remembered, ReportJournal
from .synthesis import synthesise
from .window import EndedWindow, JudgedCommand

log = structlog.get_logger(__name__)

SLICE = 8
"""Steps that are taken in, or outcomes that are noted, before steps of the runs get the loop again."""
MOST_LOOK_UPS = 256
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
        self._ended: list[EndedWindow] = []
        """Windows whose report is not on the disk."""
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
            self._add(self._windows.expire(before_ns))
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
            log.warning("field_report_drop", reason=reason, count=count)
        self._dropped.clear()

    async def _take_in_one(self, seen: Observation | RunClosed) -> None:
        if isinstance(seen, RunClosed):
            self._add(self._windows.close_run(seen.run_id))
            return
        before = self._windows.epoch_of(seen.run_id)
        self._add(self._windows.take_in(seen))
        outcomes = iter(seen.outcomes)
        while some := list(itertools.islice(outcomes, SLICE)):
            self._add(self._windows.note(some, seen))
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
        names = self._windows.unidentified(MOST_LOOK_UPS)
        ended = [each.window.command_id for each in self._ended if each.window.command is None][:MOST_LOOK_UPS]
        wanted = {command_id for _, command_id in names} | set(ended)
        if not wanted:
            return
        commands = await asyncio.to_thread(self._journal.commands, wanted)
        for each in self._ended:
            if each.window.command is not None:
                commands.pop(each.window.command_id, None)
        self._ended = list(_identified(self._ended, wanted, commands))
        windows = [self._windows.identify(name, _of_run(name[0], commands.get(name[1]))) for name in names]
        self._journal.note_windows([window for window in windows if window])
        self._forget_idle_runs()

    async def _report_ended(self) -> None:
        """Write reports; a disk that does not take them is tried again after a while."""
        while self._clock() >= self._keep_at:
            ended = [each for each in self._ended if each.window.command is not None][:SLICE]
            if not ended:
                return
            kept = await asyncio.to_thread(self._write, ended)
            self._ended = [each for each in self._ended if each.window.command_id not in kept.commands]
            if any(each.window.command_id not in kept.commands for each in ended):
                self._keep_at = self._clock() + KEEP_AGAIN_SECONDS
            for report in kept.new:
                self._on_report(report)
                await asyncio.sleep(0)

    def _write(self, ended: Sequence[EndedWindow]) -> Kept:
        return self._journal.keep([synthesise(each, self._clock_ns()) for each in ended])

    def _add(self, ended: list[EndedWindow]) -> None:
        """Keep windows for their report. When there are too many those whose command is not known go first."""
        self._ended += ended
        excess = len(self._ended) - self._most_ended
        if excess > 0:
            gone = sorted(self._ended, key=_is_identified)[:excess]
            going = set(map(id, gone))
            self._ended = [each for each in self._ended if id(each) not in going]
            for each in gone:
                reason = "disk" if _is_identified(each) else "unknown"
                observe_report_dropped(reason)
                self._dropped[reason] += 1


def _is_identified(ended: EndedWindow) -> bool:
    return ended.window.command is not None


def _of_run(run_id: str, command: JudgedCommand | None) -> JudgedCommand | None:
    """What a run says of a command that another run was given counts for nothing."""
    return command if command is not None and command.run_id == run_id else None


def _identified(
    ended: Iterable[EndedWindow], looked_up: AbstractSet[str], commands: dict[str, JudgedCommand]
) -> Iterator[EndedWindow]:
    """Fill in commands, each once; a window without one, or with a report already, goes."""
    for each in ended:
        window = each.window
        if window.command is not None or window.command_id not in looked_up:
            yield each
        elif command := _of_run(window.run_id, commands.get(window.command_id)):
            del commands[window.command_id]
            yield replace(each, window=replace(window, command=command))
