"""Field reports without sockets and without a policy: steps are noted as the pipeline notes them."""

from __future__ import annotations

import contextlib
import uuid
from types import SimpleNamespace

import pytest

from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import ExplainDecisionResponse, OpenRunRequest, Step, StepLedger
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.choosing import Decided
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.observations import Observations
from esper_servers.tamiyo.field_reports.report_journal import KEPT, ReportJournal
from esper_servers.tamiyo.field_reports.reports import FieldReports
from esper_servers.tamiyo.records import decisions
from esper_servers.tamiyo.reporting import Reported
from esper_servers.tamiyo.risk.engine import Verdict
from esper_servers.tamiyo.risk.reading import PAUSE_AND_HOLD

SECOND = 1_000_000_000
NOMINAL = Verdict((True,) * 4, 0, "", 0.0, {})


class Desk:
    """A controller's field reports with its journal."""

    CRITICAL = Verdict((True,) * 4, PAUSE_AND_HOLD, "bsds_hazard_critical", 0.9, {}, holds=True)

    @staticmethod
    def applied(command_id):
        return CommandOutcome(command_id=command_id, result=CommandOutcome.RESULT_APPLIED)

    @staticmethod
    def failed(command_id, reason="deadline_missed"):
        return CommandOutcome(command_id=command_id, result=CommandOutcome.RESULT_FAILED, reason=reason)

    def __init__(self, directory, clock, *, config=None, publisher=None):
        self.journal = Journal(directory / "journal.sqlite", kept=KEPT)
        self.clock = clock
        self.observations = Observations()
        self.reports = FieldReports(
            self.observations, ReportJournal(self.journal), config or ReportConfig(), publisher=publisher,
            clock=clock, clock_ns=lambda: int(clock() * SECOND),
        )  # fmt: skip

    def command(self, run_id="run", *, seed_id="seed-0", blueprint_id="residual_mlp", planted=()):
        """Decide on a command; returns its identifier."""
        record, command_id = ExplainDecisionResponse(policy_version="prior-1"), str(uuid.uuid4())
        record.command.command_id, record.command.target_seed_id = command_id, seed_id
        record.command.seed_operation.blueprint_id = blueprint_id
        record.evidence.run_id = run_id
        record.evidence.planted.update(dict(planted))
        self.journal.append(decisions.KIND, command_id, record.SerializeToString())
        return command_id

    def step(self, epoch, loss=0.5, *outcomes, run_id="run", host=bytes(16), verdict=NOMINAL, **metrics):
        """Let a step be noted."""
        told = metrics if loss is None else {"loss": loss, **metrics}
        packet = SystemStatePacket(current_epoch=epoch, training_metrics=told)
        step = Step(run_id=run_id, sequence=1, packet=packet, outcomes=outcomes)
        run = SimpleNamespace(request=OpenRunRequest(run_id=run_id, receiver_epoch=host))
        ledger = StepLedger(total_us=1500)
        self.observations.note(Reported(step, ledger, "NO_ACTION", Decided(None, verdict.reason), run, verdict))

    async def listed(self):
        reports, more = await self.reports.page(1000, "")
        assert not more
        return reports

    async def observe(self, command_id, losses=(0.5, 0.4, 0.3, 0.2), **arguments):
        """Apply a command and let an epoch pass with each loss; returns its report."""
        self.step(0, losses[0], self.applied(command_id), **arguments)
        for epoch, loss in enumerate(losses[1:], 1):
            self.step(epoch, loss, **arguments)
        return next((report for report in await self.listed() if report.command_id == command_id), None)


@pytest.fixture
def clock():
    return FakeClock(1_000_000.0)


@pytest.fixture
def start(tmp_path, clock):
    """Start controllers one after the other on the same journal; one that is not closed was killed."""
    with contextlib.ExitStack() as stack:

        def begin(**settings):
            made = Desk(tmp_path, clock, **settings)
            stack.callback(made.journal.close)
            return made

        yield begin


@pytest.fixture
def desk(start):
    return start()
