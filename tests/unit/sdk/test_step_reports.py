"""When what became of steps is counted and logged: never by waking the loop for a single step."""

from __future__ import annotations

import threading

import pytest

from esper_client.event_loop import LoopThread
from esper_client.session import step_reports
from esper_client.session.step_reports import MOST_WAITING, StepReports

SOON = 30.0


class Written:
    """Takes the place of the log, and remembers who wrote."""

    def __init__(self):
        self.steps, self.threads, self.arrived = [], set(), threading.Event()

    def __call__(self, run_id, step, timing, outcomes):
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        self.arrived.set()


@pytest.fixture
def written(monkeypatch):
    found = Written()
    monkeypatch.setattr(step_reports, "report_step", found)
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


def test_a_report_waits_for_the_next_question(written, thread, monkeypatch):
    monkeypatch.setattr(step_reports, "LONGEST_SECONDS", 3600.0)
    reports = StepReports("run", thread)
    reports.add(1, None, [])
    settle(thread)
    assert written.steps == []
    thread.loop.call_soon_threadsafe(reports.question_sent)
    assert written.arrived.wait(SOON)
    assert (written.steps, written.threads) == ([1], {"the-loop"})


def test_what_comes_of_a_question_is_written_although_no_other_follows(written, thread, monkeypatch):
    monkeypatch.setattr(step_reports, "WHILE_ANSWERED_SECONDS", 0.0)
    reports = StepReports("run", thread)
    thread.loop.call_soon_threadsafe(reports.question_sent)
    settle(thread)
    reports.add(1, None, [])
    assert written.arrived.wait(SOON)
    assert written.steps == [1]


def test_where_no_question_can_be_sent_many_wake_the_loop(written, thread):
    reports = StepReports("run", thread)
    for step in range(MOST_WAITING):
        reports.add(step, None, [])
    assert written.arrived.wait(SOON)
    settle(thread)
    assert (written.steps, written.threads) == (list(range(MOST_WAITING)), {"the-loop"})


def test_of_a_closed_session_the_training_thread_writes(written, thread):
    reports = StepReports("run", thread)
    thread.stop()
    for step in range(MOST_WAITING):
        reports.add(step, None, [])
    assert written.steps == list(range(MOST_WAITING))
    assert "the-loop" not in written.threads
