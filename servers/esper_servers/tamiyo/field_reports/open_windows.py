from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from esper_rpc.proto.leyline.v1 import CommandOutcome

from .observations import Observation
from .run_trace import RunTrace
from .window import CLOSED, DISPLACED, EXPIRED, REOPENED, EndedWindow, JudgedCommand, Window

Name = tuple[str, str]
"""A run and a command: what a trainer says of a command of another run must not touch that one's window."""


@dataclass(slots=True)
class _WatchedRun:
    trace: RunTrace
    host: str = ""
    """The receiver epoch of the last step."""
    may_end: bool = False
    """Whether its windows are to be looked through."""
    windows: dict[str, Window] = field(default_factory=dict)


class OpenWindows:
    """The windows of every run. Bounded; a window that has to end is returned to whoever made it end."""

    def __init__(self, *, epochs: int, capacity: int, clock_ns: Callable[[], int]) -> None:
        self._epochs = epochs
        self._capacity = capacity
        self._clock_ns = clock_ns
        self._runs: dict[str, _WatchedRun] = {}
        self._unidentified: dict[Name, None] = {}
        """Open windows whose command was not looked up since they were opened, oldest first."""

    def __len__(self) -> int:
        return sum(len(run.windows) for run in self._runs.values())

    @property
    def runs(self) -> set[str]:
        """Runs with an open window."""
        return set(self._runs)

    def epoch_of(self, run_id: str) -> int | None:
        """Return the last epoch of a run with an open window."""
        run = self._runs.get(run_id)
        return run.trace.epoch if run else None

    def trace_of(self, run_id: str) -> RunTrace | None:
        """Copy what is known of a run with an open window."""
        run = self._runs.get(run_id)
        return run.trace.snapshot() if run else None

    def restore(self, windows: Iterable[Window], traces: Mapping[str, RunTrace]) -> None:
        """Go on with what an earlier controller observed."""
        for window in windows:
            run = self._runs.setdefault(window.run_id, _WatchedRun(RunTrace(window.run_id)))
            run.windows[window.command_id] = window
            # What was written at the last end of an epoch may be older than the window.
            known = [trace for trace in (run.trace, traces.get(window.run_id), _trace_at(window)) if trace]
            run.trace = max(known, key=lambda trace: trace.sums["steps"])

    def take_in(self, seen: Observation) -> None:
        """Add a step to its run. Next come `note`, if it tells outcomes, and `ended`."""
        run = self._runs.setdefault(seen.run_id, _WatchedRun(RunTrace(seen.run_id, seen.epoch)))
        now, before = (seen.epoch, seen.receiver_epoch.hex()), (run.trace.epoch, run.host)
        run.may_end, run.host = run.may_end or now != before, now[1]
        run.trace.take_in(seen)

    def note(self, outcomes: Iterable[CommandOutcome], seen: Observation) -> list[EndedWindow]:
        """Open windows for outcomes of a step that was taken in; returns those that had to make room."""
        for outcome in outcomes:
            self._note_outcome(self._runs[seen.run_id], outcome, seen)
        return self._make_room()

    def ended(self, seen: Observation, most: int) -> list[EndedWindow]:
        """End windows that a step brought to their end, and return them; ask until there are none."""
        run = self._runs.get(seen.run_id)
        if run is None:
            return []
        found = []
        if run.may_end:
            found = self._end(run, REOPENED, lambda window: window.receiver_epoch != run.host, most)
            found = found or self._end(run, "", lambda window: seen.epoch - window.epoch >= self._epochs, most)
            run.may_end = bool(found)
        self._drop_if_idle(run)
        return found

    def close_run(self, run_id: str, most: int) -> list[EndedWindow]:
        """End windows of a run; ask until there are none."""
        run = self._runs.get(run_id)
        return self._end(run, CLOSED, lambda _: True, most) if run else []

    def expire(self, before_ns: int, most: int) -> list[EndedWindow]:
        """End windows that were opened before a time; ask until there are none."""
        for run in list(self._runs.values()):
            if found := self._end(run, EXPIRED, lambda window: window.opened_ns < before_ns, most):
                return found
        return []

    def unidentified(self, most: int) -> list[Name]:
        """Return windows whose command is to be looked up, oldest first."""
        return list(itertools.islice(self._unidentified, most))

    def identify(self, name: Name, command: JudgedCommand | None) -> Window | None:
        """Tell what the record of a command says; None takes the window away. Returns what stays."""
        if name not in self._unidentified:
            return None
        del self._unidentified[name]
        run, command_id = self._runs[name[0]], name[1]
        if command is not None:
            run.windows[command_id] = replace(run.windows[command_id], command=command)
            return run.windows[command_id]
        del run.windows[command_id]
        self._drop_if_idle(run)
        return None

    def _note_outcome(self, run: _WatchedRun, outcome: CommandOutcome, seen: Observation) -> None:
        known = run.windows.get(outcome.command_id)
        applied = outcome.result == CommandOutcome.RESULT_APPLIED
        # No answer from a seed host counts as a failure until the outcome comes after all.
        if known is None or (applied and not known.is_applied):
            run.windows[outcome.command_id] = self._open(run.trace, outcome, seen, is_applied=applied)
            self._unidentified[seen.run_id, outcome.command_id] = None

    def _open(self, trace: RunTrace, outcome: CommandOutcome, seen: Observation, *, is_applied: bool) -> Window:
        return Window(
            command_id=outcome.command_id,
            run_id=trace.run_id,
            receiver_epoch=seen.receiver_epoch.hex(),
            epoch=seen.epoch,
            opened_ns=self._clock_ns(),
            is_applied=is_applied,
            failure="" if is_applied else outcome.reason,
            loss=trace.loss,
            latencies=trace.latencies.copy(),
            sums=dict(trace.sums),
        )

    def _end(self, run: _WatchedRun, cut_short: str, is_over: Callable[[Window], bool], most: int) -> list[EndedWindow]:
        over = list(itertools.islice(filter(is_over, run.windows.values()), most))
        if not over:
            return []
        snapshot = run.trace.snapshot()
        for window in over:
            self._remove(run, window)
        self._drop_if_idle(run)
        return [EndedWindow(window, snapshot, cut_short) for window in over]

    def _remove(self, run: _WatchedRun, window: Window) -> None:
        del run.windows[window.command_id]
        self._unidentified.pop((window.run_id, window.command_id), None)

    def _make_room(self) -> list[EndedWindow]:
        """End the oldest window of the run that has the most: who asks for too much pays for it."""
        ended: list[EndedWindow] = []
        for _ in range(len(self) - self._capacity):
            run = max(self._runs.values(), key=lambda each: len(each.windows))
            window = next(iter(run.windows.values()))
            self._remove(run, window)
            ended.append(EndedWindow(window, run.trace.snapshot(), DISPLACED))
        return ended

    def _drop_if_idle(self, run: _WatchedRun) -> None:
        """Keep a run as long as it has a window."""
        if not run.windows:
            self._runs.pop(run.trace.run_id, None)


def _trace_at(window: Window) -> RunTrace:
    trace = RunTrace(window.run_id, window.epoch, window.loss, dict(window.latencies))
    trace.sums.update(window.sums)
    return trace
