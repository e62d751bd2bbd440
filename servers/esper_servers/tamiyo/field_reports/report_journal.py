from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from esper_rpc import page_token
from esper_rpc.journal import Entry, Forgotten, Journal, Record
from esper_rpc.proto.leyline.v1 import FieldReport
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse
from esper_servers.tamiyo.records import decisions

from .run_trace import RunTrace
from .synthesis import report_id_of
from .window import JudgedCommand, Window

REPORT, WINDOW, TRACE, ATTEMPT, ACK = "report", "report_window", "report_trace", "report_attempt", "report_ack"
KEPT = frozenset({REPORT, WINDOW, TRACE, ATTEMPT, ACK})
"""What the journal drops only when it is told to: reports leave by age and number, acknowledged or not."""

READ_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class PendingReport:
    """A report that nobody acknowledged."""

    report: FieldReport
    attempts: int = 0
    """How often it was handed to the publisher."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an earlier controller left behind."""

    windows: list[Window] = field(default_factory=list)
    traces: dict[str, RunTrace] = field(default_factory=dict)
    pending: list[PendingReport] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of keeping reports."""

    new: list[FieldReport]
    """Those that were not on the disk before."""
    commands: set[str]
    """Those whose report is on the disk."""


class ReportJournal:
    """Windows and reports in the journal. `note_*` only queue; every other method waits for the disk."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def note_windows(self, windows: Sequence[Window]) -> None:
        """Write windows down; of a window that was written before the newer counts."""
        self._journal.append_made(lambda: [entry for window in windows for entry in _window_entries(window)])

    def note_trace(self, trace: RunTrace) -> None:
        """Write down what a run has come to."""
        self._journal.append_made(lambda: _replaced(TRACE, trace.run_id, _trace_body(trace)))

    def note_attempts(self, report_id: str, attempts: int) -> None:
        """Write down how often a report was handed over."""
        self._journal.append_made(lambda: _replaced(ATTEMPT, report_id, str(attempts).encode()))

    def forget_trace(self, run_id: str) -> None:
        """Let go of a run that is not watched any more."""
        self._journal.append_made(lambda: [Forgotten(TRACE, run_id)])

    def forget_windows(self, command_ids: Collection[str]) -> None:
        """Let go of windows."""
        self._journal.append_made(lambda: [Forgotten(WINDOW, command_id) for command_id in command_ids])

    def commands(self, command_ids: Collection[str]) -> dict[str, JudgedCommand]:
        """Return what was commanded, by command; one without a record, or with a report, is absent."""
        self._journal.flush()
        found = self._journal.find_all(decisions.KIND, self._without_report(command_ids))
        return {command_id: _judged(command_id, record.body) for command_id, record in found.items()}

    def keep(self, reports: Sequence[FieldReport]) -> Kept:
        """Write reports down, one for each command, and let go of the windows of those that are on the disk."""
        by_command = {report.command_id: report for report in reports}
        missing = self._without_report(by_command)
        new = [report for command_id, report in by_command.items() if command_id in missing]
        self._journal.append_made(lambda: [_record(report) for report in new])
        self._journal.flush()
        kept = by_command.keys() - self._without_report(by_command)
        self.forget_windows(kept)
        return Kept([report for report in new if report.command_id in kept], kept)

    def holds(self, report_id: str) -> bool:
        """Whether a report is on the disk."""
        return self._journal.find(REPORT, report_id) is not None

    def is_acknowledged(self, report_id: str) -> bool:
        """Whether somebody acknowledged a report."""
        return self._journal.find(ACK, report_id) is not None

    def acknowledge(self, report_id: str) -> bool:
        """Write an acknowledgement; False when the disk did not take it."""
        return self._journal.keep(ACK, report_id, b"")

    def page(self, size: int, token: str) -> tuple[list[FieldReport], str]:
        """Return reports, oldest first, and the token of the next page; raises InvalidRequest."""
        after = page_token.read(token, REPORT)
        self._journal.flush()
        found = self._journal.page(REPORT, after=after, limit=size + 1)
        reports = [FieldReport.FromString(record.body) for _, record in found[:size]]
        return reports, page_token.write(REPORT, found[size - 1][0]) if len(found) > size else ""

    def pending(self) -> int:
        """Count reports that nobody acknowledged."""
        return self._journal.count(REPORT) - self._journal.count(ACK)

    def oldest(self) -> Iterator[tuple[FieldReport, bool]]:
        """Yield every report, oldest first, with whether it was acknowledged."""
        after = 0
        while found := self._journal.page(REPORT, after=after, limit=READ_AT_ONCE):
            acknowledged = self._journal.find_all(ACK, [record.key for _, record in found])
            for _, record in found:
                yield FieldReport.FromString(record.body), record.key in acknowledged
            after = found[-1][0]

    def count(self) -> int:
        """Count reports."""
        return self._journal.count(REPORT)

    def forget(self, report_ids: Collection[str]) -> None:
        """Let go of reports and of what belongs to them."""
        kinds = (REPORT, ATTEMPT, ACK)
        self._journal.append_made(lambda: [Forgotten(kind, key) for key in report_ids for kind in kinds])
        self._journal.flush()

    def remembered(self, most_pending: int) -> Remembered:
        """Read what an earlier controller left, and let go of windows whose report was written after all."""
        windows = {record.key: _window_of(record.body) for record in self._journal.read(WINDOW)}
        traces = {record.key: _trace_of(record) for record in self._journal.read(TRACE)}
        done = windows.keys() - self._without_report(windows)
        self.forget_windows(done)
        found = [window for command_id, window in windows.items() if command_id not in done]
        for run_id in traces.keys() - {window.run_id for window in found}:
            self.forget_trace(run_id)
        return Remembered(
            windows=found,
            traces=traces,
            pending=list(itertools.islice(self._pending(), most_pending)),
        )

    def _pending(self) -> Iterator[PendingReport]:
        attempts = {record.key: int(record.body) for record in self._journal.read(ATTEMPT)}
        for report, acknowledged in self.oldest():
            if not acknowledged:
                yield PendingReport(report, attempts.get(report.report_id, 0))

    def _without_report(self, command_ids: Collection[str]) -> set[str]:
        found = self._journal.find_all(REPORT, [report_id_of(command_id) for command_id in command_ids])
        return {command_id for command_id in command_ids if report_id_of(command_id) not in found}


def _record(report: FieldReport) -> Entry:
    return Record(REPORT, report.report_id, report.SerializeToString())


def _replaced(kind: str, key: str, body: bytes) -> list[Entry]:
    return [Forgotten(kind, key), Record(kind, key, body)]


def _window_entries(window: Window) -> list[Entry]:
    return _replaced(WINDOW, window.command_id, orjson.dumps(dataclasses.asdict(window)))


def _window_of(body: bytes) -> Window:
    found = orjson.loads(body)
    command = found.pop("command")
    return Window(**found, command=JudgedCommand(**command) if command else None)


def _trace_body(trace: RunTrace) -> bytes:
    return orjson.dumps(
        {"epoch": trace.epoch, "loss": trace.loss, "latencies": trace.latencies, "sums": dict(trace.sums)}
    )


def _trace_of(record: Record) -> RunTrace:
    found = orjson.loads(record.body)
    return RunTrace(record.key, **{**found, "sums": defaultdict(float, found["sums"])})


def _judged(command_id: str, body: bytes) -> JudgedCommand:
    """Read the record of a decision; a command that plants nothing acts on what was planted before."""
    decision = ExplainDecisionResponse.FromString(body)
    command, evidence = decision.command, decision.evidence
    planted = evidence.planted.get(command.target_seed_id, "") if command.target_seed_id else ""
    return JudgedCommand(
        command_id=command_id,
        run_id=evidence.run_id,
        seed_id=command.target_seed_id,
        blueprint_id=command.seed_operation.blueprint_id or planted,
        policy_version=decision.policy_version,
    )
