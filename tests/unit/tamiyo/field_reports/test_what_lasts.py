"""What a journal holds of field reports: across a restart, for a day, on a full disk."""

from __future__ import annotations

import asyncio
import resource

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc import page_token
from esper_rpc.errors import ConfigError, InvalidRequest, NotFound, ResourceExhausted
from esper_rpc.journal import Record
from esper_rpc.proto.leyline.v1 import FieldReport, FieldReportOutcome
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.report_journal import ATTEMPT, KEPT, REPORT, TRACE, WINDOW, ReportJournal
from esper_servers.tamiyo.field_reports.writer import KEEP_AGAIN_SECONDS

SUCCESS = FieldReportOutcome.FIELD_REPORT_OUTCOME_SUCCESS
REGRESSION = FieldReportOutcome.FIELD_REPORT_OUTCOME_REGRESSION
DAY = 86_400


def keys(desk, kind):
    desk.journal.flush()
    return [record.key for record in desk.journal.read(kind)]


def pending():
    return REGISTRY.get_sample_value("esper_field_reports_pending")


async def test_a_window_goes_on_where_the_controller_before_left_it(start):
    desk = start()
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    desk.step(1, 0.9, verdict=desk.CRITICAL)
    desk.step(2, 0.4)
    await desk.reports.catch_up()
    desk.journal.flush()
    after = start()
    assert after.observations.watched == {"run"}
    after.step(2, 0.35)
    after.step(3, 0.3)
    (report,) = await after.listed()
    assert (report.outcome, report.observation_window_epochs) == (REGRESSION, 3)
    assert report.metrics["loss_delta"] == pytest.approx(-0.2)
    assert report.metrics["steps"] == 4


async def test_a_window_that_was_opened_after_the_last_end_of_an_epoch_goes_on_too(start):
    desk = start()
    early, late = desk.command(), desk.command()
    desk.step(0, 0.5, desk.applied(early))
    await desk.reports.catch_up()
    desk.step(1, 0.5, verdict=desk.CRITICAL)
    desk.step(1, 0.5, verdict=desk.CRITICAL)
    desk.step(1, 0.5, desk.applied(late))
    await desk.reports.catch_up()
    desk.journal.flush()
    after = start()
    after.step(4, 0.4)
    found = {report.command_id: report for report in await after.listed()}
    assert (found[early].outcome, found[late].outcome) == (REGRESSION, SUCCESS)
    assert (found[early].metrics["criticals"], found[late].metrics["criticals"]) == (2, 0)


async def test_a_controller_killed_between_a_report_and_its_window_makes_no_second_one(start):
    desk = start()
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    await desk.reports.catch_up()
    desk.journal.flush()
    (window,) = desk.journal.read(WINDOW)
    await desk.observe(command_id)
    desk.journal.append_made(lambda: [Record(WINDOW, window.key, window.body)])
    desk.journal.flush()
    after = start()
    assert not after.observations.watched
    after.step(9, 0.1)
    assert len(await after.listed()) == 1
    assert keys(after, WINDOW) == []


async def test_the_trace_of_a_run_whose_windows_have_ended_goes_at_the_next_start(start):
    desk = start()
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    desk.step(1, 0.5)
    await desk.reports.catch_up()
    desk.journal.flush()
    (trace,) = desk.journal.read(TRACE)
    await desk.observe(command_id)
    desk.journal.append(TRACE, trace.key, trace.body)
    desk.journal.flush()
    assert keys(start(), TRACE) == []


def test_a_report_that_is_on_the_disk_is_written_and_told_no_second_time(desk):
    journal, report = ReportJournal(desk.journal), FieldReport(report_id="fr-synth-x", command_id="x")
    found = [journal.keep([report]) for _ in range(2)]
    assert [(kept.new, kept.commands) for kept in found] == [([report], {"x"}), ([], {"x"})]
    assert keys(desk, REPORT) == ["fr-synth-x"]


async def test_nothing_but_the_report_stays_when_a_window_has_ended(desk):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    await desk.reports.catch_up()
    assert keys(desk, WINDOW) == [command_id]
    for epoch in (1, 2, 3):
        desk.step(epoch, 0.4)
    await desk.listed()
    assert [keys(desk, kind) for kind in sorted(KEPT)] == [[f"fr-synth-{command_id}"], [], [], [], []]


async def test_the_trace_of_a_run_is_kept_once(desk):
    desk.step(0, 0.5, desk.applied(desk.command()))
    await desk.reports.catch_up()
    for epoch in (1, 0, 1, 0, 1, 2):
        desk.step(epoch, 0.5)
        await desk.reports.catch_up()
    assert keys(desk, TRACE) == ["run"]


async def test_an_acknowledgement_counts_once_and_outlasts_the_controller(start):
    desk = start()
    report = await desk.observe(desk.command())
    assert pending() == 1
    answers = await asyncio.gather(*(desk.reports.acknowledge(report.report_id) for _ in range(5)))
    assert sorted(answers) == [False, True, True, True, True]
    assert pending() == 0
    after = start()
    assert pending() == 0
    assert await after.reports.acknowledge(report.report_id)
    assert await after.listed() == [report]


async def test_only_a_report_can_be_acknowledged(desk):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    for name in (f"fr-synth-{command_id}", command_id, "", "x" * 256):
        with pytest.raises(NotFound):
            await desk.reports.acknowledge(name)


async def test_pages_follow_each_other_oldest_first(desk):
    commands = [desk.command() for _ in range(7)]
    for command_id in commands:
        await desk.observe(command_id)
    found, token = [], ""
    while not found or token:
        page, token = await desk.reports.page(3, token)
        found.append([report.command_id for report in page])
    assert found == [commands[:3], commands[3:6], commands[6:]]


@pytest.mark.parametrize("token", ["x", page_token.write("pause", 3), page_token.write("report", 10**18)])
async def test_a_token_from_elsewhere_is_refused_by_its_field(desk, token):
    with pytest.raises(InvalidRequest) as refused:
        await desk.reports.page(3, token)
    assert [violation.field for violation in refused.value.violations] == ["page_token"]


async def test_after_a_day_a_report_goes_and_who_never_took_it_is_told(start, clock):
    desk = start()
    old = [await desk.observe(desk.command()) for _ in range(2)]
    await desk.reports.acknowledge(old[0].report_id)
    clock.advance(DAY - 1)
    young = await desk.observe(desk.command())
    await desk.reports.prune()
    assert len(await desk.listed()) == 3
    clock.advance(2)
    with capture_logs() as told:
        await desk.reports.prune()
    assert await desk.listed() == [young]
    dropped = [(entry["report_id"], entry["reason"]) for entry in told if entry["event"] == "field_report_drop"]
    assert dropped == [(old[1].report_id, "retention")]
    assert pending() == 1
    assert not keys(desk, ATTEMPT)


async def test_a_full_disk_keeps_what_is_too_old_until_there_is_room(desk, clock):
    report = await desk.observe(desk.command())
    clock.advance(DAY + 1)
    with full_disk(), capture_logs() as told:
        await desk.reports.prune()
        assert await desk.listed() == [report]
    assert "field_report_drop" not in [entry["event"] for entry in told]
    await desk.reports.prune()
    assert await desk.listed() == []


async def test_the_oldest_goes_when_there_are_too_many(start):
    desk = start(config=ReportConfig(max_reports=2))
    reports = [await desk.observe(desk.command()) for _ in range(4)]
    await desk.reports.prune()
    assert await desk.listed() == reports[2:]


async def test_a_clock_that_is_set_back_forgets_nothing(start, clock):
    desk = start()
    report = await desk.observe(desk.command())
    clock.advance(-10 * DAY)
    await desk.reports.prune()
    assert await start().listed() == [report]


class full_disk:
    """A limit on the size of files stands for it."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


async def test_a_report_that_the_disk_does_not_take_is_written_when_there_is_room(desk, clock):
    command_id = desk.command()
    desk.step(0, 0.5, desk.applied(command_id))
    await desk.reports.catch_up()
    desk.journal.flush()
    with full_disk():
        desk.step(3, 0.4)
        for _ in range(5):
            await desk.reports.catch_up()
        assert await desk.listed() == []
        dropped = desk.journal.dropped
    await desk.reports.catch_up()
    assert dropped == 1
    clock.advance(KEEP_AGAIN_SECONDS)
    (report,) = await desk.listed()
    assert report.command_id == command_id
    assert keys(desk, REPORT) == [report.report_id]


async def test_what_the_disk_does_not_take_for_long_is_bounded_and_counted(start):
    desk = start(config=ReportConfig(max_windows=2))
    commands = [desk.command() for _ in range(6)]
    desk.journal.flush()
    before = REGISTRY.get_sample_value("esper_field_reports_dropped_total", {"reason": "disk"}) or 0
    with full_disk():
        for command_id in commands:
            desk.step(0, 0.5, desk.applied(command_id))
            await desk.reports.catch_up()
        await desk.reports.catch_up()
    assert len(desk.reports._writer._ended) == 2
    assert REGISTRY.get_sample_value("esper_field_reports_dropped_total", {"reason": "disk"}) - before == 2


async def test_an_acknowledgement_that_cannot_be_written_is_refused_and_can_be_repeated(desk):
    report = await desk.observe(desk.command())
    with full_disk():
        with pytest.raises(ResourceExhausted) as refused:
            await desk.reports.acknowledge(report.report_id)
    assert refused.value.reason == "STORAGE"
    assert pending() == 1
    assert not await desk.reports.acknowledge(report.report_id)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="window_epochs"):
        ReportConfig(window_epochs=0)
