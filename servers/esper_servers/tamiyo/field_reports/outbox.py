from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esper_rpc.breaker import CircuitBreaker
from esper_rpc.proto.leyline.v1 import CircuitState, FieldReport, TelemetryLevel
from esper_rpc.telemetry.events import Detail, tell_event
from esper_rpc.telemetry.metrics import observe_report_dropped, observe_report_published, observe_report_retry
from esper_servers.tamiyo.risk.events import SOURCE

from .config import ReportConfig
from .publisher import ReportPublisher
from .report_journal import PendingReport

_AT_ONCE = {
    CircuitState.CIRCUIT_STATE_CLOSED: 8,
    CircuitState.CIRCUIT_STATE_HALF_OPEN: 1,
    CircuitState.CIRCUIT_STATE_OPEN: 0,
}
NOT_ACKNOWLEDGED = "it was not acknowledged"


@dataclass(slots=True)
class _Pending:
    report: FieldReport
    attempts: int = 0
    error: str = NOT_ACKNOWLEDGED
    """Why the last attempt was not the last."""


class Outbox:
    """Hands reports to the publisher until they are acknowledged, a few times at most; then it lets go of them.

    What it lets go of stays in the journal. Handing over, like an acknowledgement, is waited for `ack_seconds`. While
    the breaker is open reports wait, and none of their attempts is spent.
    """

    def __init__(
        self,
        publisher: ReportPublisher,
        config: ReportConfig,
        *,
        note_attempts: Callable[[str, int], None],
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publisher = publisher
        self._config = config
        self._note_attempts = note_attempts
        self._breaker = breaker or CircuitBreaker(clock=clock)
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._schedule: list[tuple[float, str]] = []
        """A heap of when each is due; one that is on its way stands in it no more."""

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, report: FieldReport) -> None:
        """Have a report published with the next that are due."""
        if len(self._pending) >= self._config.max_pending:
            tell_drop(report, "outbox", attempts=0, error="too many reports wait for the publisher")
            return
        self._pending[report.report_id] = _Pending(report)
        self._wait(report.report_id, 0.0)

    def restore(self, reports: Iterable[PendingReport]) -> None:
        """Go on where an earlier controller left off."""
        for known in reports:
            if known.attempts < self._config.attempts:
                self._pending[known.report.report_id] = _Pending(known.report, known.attempts)
                self._wait(known.report.report_id, self._backoff(known.attempts) if known.attempts else 0.0)

    def let_go(self, report_id: str) -> None:
        """Forget a report, because it was acknowledged or is too old."""
        self._pending.pop(report_id, None)

    async def publish_due(self) -> int:
        """Hand over what is due now; returns how many reports the publisher took."""
        taken = 0
        while due := self._take_due():
            taken += sum(await asyncio.gather(*map(self._attempt, due)))
        return taken

    def _take_due(self) -> list[str]:
        found: list[str] = []
        most = _AT_ONCE[self._breaker.state]
        while len(found) < most and self._schedule and self._schedule[0][0] <= self._clock():
            found.append(heapq.heappop(self._schedule)[1])
        return found

    def _wait(self, report_id: str, seconds: float) -> None:
        heapq.heappush(self._schedule, (self._clock() + seconds, report_id))

    async def _attempt(self, report_id: str) -> bool:
        """Try once; whether the publisher took it."""
        pending = self._pending.get(report_id)
        if pending is None:
            return False
        if pending.attempts >= self._config.attempts:
            self._give_up(pending)
            return False
        if not self._breaker.allow():
            self._wait(report_id, self._config.backoff_seconds)
            return False
        if pending.attempts:
            _tell_retry(pending)
        pending.attempts += 1
        error = "it was cut off"
        try:
            error = await self._hand_over(pending.report)
        finally:
            (self._breaker.record_failure if error else self._breaker.record_success)()
            self._settle(pending, error)
        return not error

    async def _hand_over(self, report: FieldReport) -> str:
        """Return what went wrong, empty when nothing did."""
        try:
            async with asyncio.timeout(self._config.ack_seconds):
                await self._publisher.publish(report)
        except Exception as error:  # noqa: BLE001  # The edge to whoever publishes: whatever it is, it is tried again.
            return repr(error)[:200]
        observe_report_published()
        return ""

    def _settle(self, pending: _Pending, error: str) -> None:
        """Say when it is due again: after the backoff, and not before an acknowledgement had its time."""
        report_id, pending.error = pending.report.report_id, error or NOT_ACKNOWLEDGED
        if report_id not in self._pending:
            return
        self._note_attempts(report_id, pending.attempts)
        if error and pending.attempts >= self._config.attempts:
            self._give_up(pending)
        else:
            backoff = self._backoff(pending.attempts)
            self._wait(report_id, backoff if error else max(backoff, self._config.ack_seconds))

    def _backoff(self, attempts: int) -> float:
        seconds: float = self._config.backoff_seconds * self._config.backoff_multiplier ** (attempts - 1)
        return seconds

    def _give_up(self, pending: _Pending) -> None:
        del self._pending[pending.report.report_id]
        tell_drop(pending.report, "attempts", attempts=pending.attempts, error=pending.error)


def tell_drop(report: FieldReport, reason: str, *, attempts: int, error: str) -> None:
    """Count and tell a report that is not handed over any more."""
    observe_report_dropped(reason)
    _tell("field_report_drop", report, reason, attempts=attempts, error=error)


def _tell_retry(pending: _Pending) -> None:
    observe_report_retry()
    reason = "not_acknowledged" if pending.error == NOT_ACKNOWLEDGED else "not_taken"
    _tell("field_report_retry", pending.report, reason, attempt=pending.attempts + 1, error=pending.error)


def _tell(name: str, report: FieldReport, reason: str, **details: Detail) -> None:
    tell_event(
        SOURCE, name, TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=reason, step_index=None,
        report_id=report.report_id, run_id=report.training_run_id, **details,
    )  # fmt: skip
