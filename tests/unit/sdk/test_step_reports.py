"""When what became of steps is counted and logged: by the loop when it is awake, and nothing wakes it for that."""

from __future__ import annotations

import threading

import pytest

from esper_client.event_loop import LoopThread
from esper_client.session import step_reports
from esper_client.session.step_reports import StepReports
from esper_rpc.proto.leyline.v1 import TelemetryLevel, TelemetryPacket

SOON = 30.0
INFO = TelemetryPacket(packet_id="info", level=TelemetryLevel.TELEMETRY_LEVEL_INFO)
CRITICAL = TelemetryPacket(packet_id="critical", level=TelemetryLevel.TELEMETRY_LEVEL_CRITICAL)


class Written:
    """Takes the place of logs and metrics, and remembers who wrote."""

    def __init__(self):
        self.what, self.threads, self.arrived = [], set(), threading.Event()

    def report(self, run_id, step, timing, outcomes):
        self._note(step)

    def record(self, packets):
        self._note([packet.packet_id for packet in packets])

    def _note(self, what):
        self.what.append(what)
        self.threads.add(threading.current_thread().name)
        self.arrived.set()


@pytest.fixture
def written(monkeypatch):
    found = Written()
    monkeypatch.setattr(step_reports, "report_step", found.report)
    monkeypatch.setattr(step_reports, "record_packets", found.record)
    return found


@pytest.fixture
def thread():
    thread = LoopThread("the-loop")
    yield thread
    thread.stop()


def settle(thread):
    """Let the loop do all that it was given."""

    async def nothing():
        pass

    thread.run(nothing(), timeout=SOON)


def test_reports_wait_for_company_and_then_for_the_next_question(written, thread, monkeypatch):
    monkeypatch.setattr(step_reports, "LONGEST_SECONDS", 3600.0)
    monkeypatch.setattr(step_reports, "WHILE_ANSWERED_SECONDS", 0.0)
    reports = StepReports("run")
    for step in range(step_reports.COMPANY // 2):
        thread.loop.call_soon_threadsafe(reports.question_sent)
        settle(thread)
        settle(thread)
        reports.add_packets([INFO])
        reports.add(step, None, [])
    assert written.what == []
    thread.loop.call_soon_threadsafe(reports.question_sent)
    assert written.arrived.wait(SOON)
    settle(thread)
    assert (written.what, written.threads) == ([["info"], 0, ["info"], 1, ["info"], 2, ["info"], 3], {"the-loop"})


def test_what_comes_of_a_question_is_written_although_no_other_follows(written, thread):
    reports = StepReports("run")
    thread.loop.call_soon_threadsafe(reports.question_sent)
    settle(thread)
    reports.add(1, None, [])
    assert written.arrived.wait(SOON)
    assert written.what == [1]


def test_what_is_critical_is_recorded_at_once_after_what_came_before(written):
    reports = StepReports("run")
    reports.add_packets([INFO])
    reports.add_packets([INFO, CRITICAL])
    assert written.what == [["info"], ["info", "critical"]]


def test_the_training_thread_may_write_what_waits(written):
    reports = StepReports("run")
    for step in range(3):
        reports.add(step, None, [])
    reports.write()
    reports.write()
    assert written.what == [0, 1, 2]
