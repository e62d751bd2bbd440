from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from esper_rpc.breaker import CircuitBreaker
from esper_rpc.errors import NotFound, ResourceExhausted
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import FieldReport, FieldReportOutcome, TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import tell_pending_reports
from esper_servers.tamiyo.risk.events import SOURCE

from .config import ReportConfig
from .observations import Observations
from .outbox import Outbox, tell_drop
from .publisher import ReportPublisher
from .report_journal import ReportJournal
from .retention import prune
from .writer import ReportWriter


class FieldReports:
    """From the outcome of a command to a report that is acknowledged. Nothing here is waited for by a step.

    `catch_up`, `publish_due` and `prune` are chores: do each again and again.
    """

    def __init__(
        self,
        observations: Observations,
        journal: ReportJournal,
        config: ReportConfig,
        *,
        clock_ns: Callable[[], int],
        publisher: ReportPublisher | None = None,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._config = config
        self._clock_ns = clock_ns
        self._writer = ReportWriter(
            observations, journal, config, clock=clock, clock_ns=clock_ns, on_report=self._on_report
        )
        self._outbox = None
        if publisher is not None:
            self._outbox = Outbox(publisher, config, note_attempts=journal.note_attempts, breaker=breaker, clock=clock)
        self._pending = 0
        self._one_acknowledgement_at_a_time = asyncio.Lock()
        self._restore()

    @classmethod
    def of(
        cls,
        observations: Observations,
        journal: Journal,
        config: ReportConfig,
        *,
        clock_ns: Callable[[], int],
        publisher: ReportPublisher | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> FieldReports:
        """Keep windows and reports in a journal, which is read for what is not done yet."""
        return cls(
            observations, ReportJournal(journal), config, clock_ns=clock_ns, publisher=publisher, breaker=breaker
        )

    async def catch_up(self) -> None:
        """Take in what was seen since the last time, and write the reports that are due."""
        # A caller that gives up must not end it in the middle.
        await asyncio.shield(asyncio.create_task(self._writer.catch_up()))

    async def publish_due(self) -> int:
        """Hand to the publisher what is due; returns how many reports it took."""
        return await self._outbox.publish_due() if self._outbox is not None else 0

    async def flush(self) -> int:
        """Write and hand over everything that is due now; returns how many reports the publisher took."""
        await self.catch_up()
        return await self.publish_due()

    async def acknowledge(self, report_id: str) -> bool:
        """Note that a report arrived; returns whether that was known. Raises NotFound and ResourceExhausted."""
        await self.catch_up()
        return await asyncio.shield(asyncio.create_task(self._acknowledge(report_id)))

    async def page(self, size: int, token: str) -> tuple[list[FieldReport], str]:
        """Return reports, oldest first, and the token of the next page; raises InvalidRequest."""
        await self.catch_up()
        return await asyncio.to_thread(self._journal.page, size, token)

    async def prune(self) -> None:
        """End windows and forget reports that are too old."""
        before_ns = self._clock_ns() - int(self._config.retention_seconds * 1e9)
        await self._writer.expire(before_ns)
        most = self._config.max_reports
        for report, reason in await asyncio.to_thread(prune, self._journal, before_ns=before_ns, most=most):
            self._let_go(report.report_id)
            tell_drop(report, reason, attempts=0, error="it was never acknowledged")
            await asyncio.sleep(0)
        self._tell_pending(await asyncio.to_thread(self._journal.pending))

    async def _acknowledge(self, report_id: str) -> bool:
        async with self._one_acknowledgement_at_a_time:
            if not await asyncio.to_thread(self._journal.holds, report_id):
                raise NotFound(f"There is no field report {report_id!r}.")
            if await asyncio.to_thread(self._journal.is_acknowledged, report_id):
                return True
            if not await asyncio.to_thread(self._journal.acknowledge, report_id):
                raise ResourceExhausted("The acknowledgement cannot be written.", reason="STORAGE")
            self._let_go(report_id)
            self._tell_pending(self._pending - 1)
            return False

    def _restore(self) -> None:
        found = self._journal.remembered(self._config.max_pending if self._outbox is not None else 0)
        self._writer.restore(found)
        if self._outbox is not None:
            self._outbox.restore(found.pending)
        self._tell_pending(self._journal.pending())

    def _on_report(self, report: FieldReport) -> None:
        outcome = FieldReportOutcome.Name(report.outcome).removeprefix("FIELD_REPORT_OUTCOME_")
        tell_event(
            SOURCE, "field_report_synthesised", TelemetryLevel.TELEMETRY_LEVEL_INFO, reason=outcome,
            report_id=report.report_id, run_id=report.training_run_id, epochs=report.observation_window_epochs,
        )  # fmt: skip
        self._tell_pending(self._pending + 1)
        if self._outbox is not None:
            self._outbox.add(report)

    def _let_go(self, report_id: str) -> None:
        if self._outbox is not None:
            self._outbox.let_go(report_id)

    def _tell_pending(self, pending: int) -> None:
        self._pending = pending
        tell_pending_reports(pending)
