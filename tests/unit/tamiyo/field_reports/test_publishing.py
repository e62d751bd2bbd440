from __future__ import annotations

import asyncio
import threading

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc.errors import Unavailable
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import listen
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.report_journal import ATTEMPT

HOUR = 3600


class Consumer:
    """Takes reports, or is away."""

    def __init__(self):
        self.is_away = False
        self.seen = []

    async def publish(self, report):
        if self.is_away:
            raise Unavailable("Nobody is there.")
        self.seen.append(report.command_id)


@pytest.fixture
def consumer():
    return Consumer()


@pytest.fixture
def desk(start, consumer):
    return start(publisher=consumer)


def counted(name, **labels):
    return REGISTRY.get_sample_value(f"esper_field_reports_{name}_total", labels) or 0.0


async def when_published(desk, clock, seconds):
    """The seconds after which something was handed over, or tried to be."""
    found, before = [], counted("retries")
    for second in range(seconds):
        await desk.reports.publish_due()
        if counted("retries") > before:
            found.append(second)
        before = counted("retries")
        clock.advance(1)
    return found


async def test_a_report_is_handed_over_and_not_again_when_it_is_acknowledged(desk, consumer, clock):
    before = counted("published")
    report = await desk.observe(desk.command())
    assert await desk.reports.publish_due() == 1
    await desk.reports.acknowledge(report.report_id)
    assert await when_published(desk, clock, 20) == []
    assert consumer.seen == [report.command_id]
    assert counted("published") - before == 1


async def test_a_report_that_is_written_is_an_event_with_its_outcome_on_the_normal_lane(desk):
    heard = []
    stop = listen(heard.append)
    report = await desk.observe(desk.command())
    stop()
    (event,) = (event for packet in heard for event in packet.events)
    assert (event.description, event.level) == ("field_report_synthesised", TelemetryLevel.TELEMETRY_LEVEL_INFO)
    assert dict(event.attributes) == {
        "reason": "SUCCESS", "priority": "NORMAL", "report_id": report.report_id, "run_id": "run", "epochs": "3",
    }  # fmt: skip


async def test_who_is_away_is_asked_again_after_one_second_and_two_more_and_then_no_more(desk, consumer, clock):
    consumer.is_away = True
    report, dropped = await desk.observe(desk.command()), counted("dropped", reason="attempts")
    with capture_logs() as told:
        assert await when_published(desk, clock, 60) == [1, 3]
    events = [(entry["event"], entry["log_level"], entry["report_id"]) for entry in told]
    assert events == [
        ("field_report_retry", "warning", report.report_id),
        ("field_report_retry", "warning", report.report_id),
        ("field_report_drop", "warning", report.report_id),
    ]
    assert [entry.get("attempt") for entry in told] == [2, 3, None]
    assert [(entry["reason"], entry["priority"]) for entry in told] == [
        ("not_taken", "NORMAL"), ("not_taken", "NORMAL"), ("attempts", "NORMAL"),
    ]  # fmt: skip
    assert "Nobody is there" in told[0]["error"]
    assert counted("dropped", reason="attempts") - dropped == 1
    assert await desk.listed() == [report]
    assert len(desk.reports._outbox) == 0


async def test_who_takes_it_and_stays_silent_gets_it_again_after_the_time_for_an_acknowledgement(desk, consumer, clock):
    report = await desk.observe(desk.command())
    with capture_logs() as told:
        assert await when_published(desk, clock, 60) == [2, 4]
    assert consumer.seen == [report.command_id] * 3
    assert [entry["error"] for entry in told] == ["it was not acknowledged"] * 3
    assert [entry["reason"] for entry in told] == ["not_acknowledged", "not_acknowledged", "attempts"]


async def test_a_step_of_the_wall_clock_does_not_move_a_retry(start, consumer, clock):
    desk = start(publisher=consumer)
    consumer.is_away = True
    await desk.observe(desk.command())
    await desk.reports.publish_due()
    desk.reports._clock_ns = desk.reports._writer._clock_ns = lambda: 10**19
    retries = counted("retries")
    await desk.reports.publish_due()
    assert counted("retries") == retries
    clock.advance(1)
    await desk.reports.publish_due()
    assert counted("retries") == retries + 1


async def test_a_consumer_that_hangs_counts_as_away(start):
    class Hanging:
        async def publish(self, report):
            await asyncio.Event().wait()

    desk = start(publisher=Hanging(), config=ReportConfig(ack_seconds=0.01))
    await desk.observe(desk.command())
    assert await desk.reports.publish_due() == 0
    assert len(desk.reports._outbox) == 1


async def test_an_acknowledgement_that_overtakes_the_end_of_handing_over_counts(start, clock):
    class Quick:
        async def publish(self, report):
            await desk.reports.acknowledge(report.report_id)

    desk = start(publisher=Quick())
    report = await desk.observe(desk.command())
    assert await desk.reports.publish_due() == 1
    assert len(desk.reports._outbox) == 0
    assert await when_published(desk, clock, 10) == []
    assert await desk.reports.acknowledge(report.report_id)


async def test_an_acknowledgement_counts_also_when_the_last_handing_over_fails_after_it(start, clock):
    class Breaking:
        async def publish(self, report):
            await desk.reports.acknowledge(report.report_id)
            raise Unavailable("It broke off.")

    desk = start(publisher=Breaking(), config=ReportConfig(attempts=1))
    dropped = counted("dropped", reason="attempts")
    await desk.observe(desk.command())
    assert await desk.reports.publish_due() == 0
    assert (len(desk.reports._outbox), counted("dropped", reason="attempts")) == (0, dropped)
    desk.journal.flush()
    assert list(desk.journal.read(ATTEMPT)) == []


async def test_what_was_cut_off_is_tried_again(start, clock):
    class Slow:
        async def publish(self, report):
            self.started.set()
            await asyncio.Event().wait()

    slow = Slow()
    slow.started = asyncio.Event()
    desk = start(publisher=slow)
    await desk.observe(desk.command())
    publishing = asyncio.create_task(desk.reports.publish_due())
    await slow.started.wait()
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    slow.publish = Consumer().publish
    clock.advance(1)
    assert await desk.reports.publish_due() == 1


async def test_a_caller_that_gives_up_cuts_nothing_off(desk, consumer, monkeypatch):
    is_writing, go_on, write = threading.Event(), threading.Event(), desk.reports._writer._write

    def write_slowly(ended):
        is_writing.set()
        go_on.wait()
        return write(ended)

    monkeypatch.setattr(desk.reports._writer, "_write", write_slowly)
    command_id = desk.command()
    caller = asyncio.create_task(desk.observe(command_id))
    await asyncio.to_thread(is_writing.wait)
    caller.cancel()
    await asyncio.wait([caller])
    go_on.set()
    while not desk.reports._journal.holds(f"fr-synth-{command_id}"):
        await asyncio.sleep(0.01)
    assert await desk.reports.flush() == 1
    assert consumer.seen == [command_id]


async def test_after_a_restart_only_what_is_not_acknowledged_is_handed_over(start, consumer, clock):
    desk = start(publisher=consumer)
    taken, waiting = await desk.observe(desk.command()), await desk.observe(desk.command())
    await desk.reports.publish_due()
    await desk.reports.acknowledge(taken.report_id)
    consumer.seen.clear()
    after = start(publisher=consumer)
    assert await when_published(after, clock, 60) == [1, 3]
    assert consumer.seen == [waiting.command_id] * 2


async def test_attempts_before_a_restart_count(start, consumer, clock):
    desk = start(publisher=consumer)
    consumer.is_away = True
    await desk.observe(desk.command())
    await when_published(desk, clock, 2)
    desk.journal.flush()
    after = start(publisher=consumer)
    consumer.is_away = False
    await when_published(after, clock, 60)
    assert len(consumer.seen) == 1


async def test_what_was_given_up_is_not_taken_up_by_a_restart_and_is_still_listed(start, consumer, clock):
    desk = start(publisher=consumer)
    consumer.is_away = True
    report = await desk.observe(desk.command())
    await when_published(desk, clock, 10)
    desk.journal.flush()
    consumer.is_away = False
    after = start(publisher=consumer)
    with capture_logs() as told:
        await when_published(after, clock, 10)
    assert (consumer.seen, told) == ([], [])
    assert await after.listed() == [report]


async def test_what_the_publisher_has_no_room_for_stays_in_the_journal(start, consumer):
    desk = start(publisher=consumer, config=ReportConfig(max_pending=2))
    dropped = counted("dropped", reason="outbox")
    for _ in range(3):
        await desk.observe(desk.command())
    assert await desk.reports.publish_due() == 2
    assert counted("dropped", reason="outbox") - dropped == 1
    assert len(await desk.listed()) == 3


async def test_a_flush_writes_and_hands_over_what_is_due_and_counts_it(desk, consumer):
    desk.step(0, 0.5)
    command_ids = [desk.command() for _ in range(20)]
    for command_id in command_ids:
        await desk.observe(command_id)
    assert await desk.reports.flush() == 20
    assert await desk.reports.flush() == 0
    assert sorted(consumer.seen) == sorted(command_ids)


async def test_without_a_publisher_nothing_is_tried_and_nothing_is_given_up(start, clock):
    desk = start()
    report = await desk.observe(desk.command())
    assert await desk.reports.flush() == 0
    with capture_logs() as told:
        assert await when_published(desk, clock, 60) == []
    assert told == []
    assert not await desk.reports.acknowledge(report.report_id)


async def test_a_report_that_is_too_old_is_not_handed_over_any_more(desk, consumer, clock):
    await desk.observe(desk.command())
    clock.advance(24 * HOUR + 1)
    await desk.reports.prune()
    assert await desk.reports.publish_due() == 0
