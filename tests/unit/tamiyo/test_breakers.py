"""What Tamiyo stops calling when it fails, and that this holds the policy back."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.errors import DeadlineExceeded, Unavailable
from esper_rpc.journal import Journal
from esper_rpc.proto.leyline.v1 import CircuitState, FieldReport, TelemetryLevel
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, Blueprint, ListBlueprintsResponse
from esper_rpc.telemetry.events import listen
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.breakers import CONFIGS, FIELD_REPORTS, JOURNAL, STATE_FILES, URZA, Breakers
from esper_servers.tamiyo.conservative_mode import COOL_DOWN_SECONDS, EXIT_SUCCESSES, ConservativeMode
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.outbox import Outbox
from esper_servers.tamiyo.lasting_state import LastingState

OPEN, CLOSED = CircuitState.CIRCUIT_STATE_OPEN, CircuitState.CIRCUIT_STATE_CLOSED
FAILURES = 3


@pytest.fixture
def clock():
    return FakeClock(100.0)


@pytest.fixture
def mode(clock):
    return ConservativeMode(clock)


@pytest.fixture
def breakers(mode, clock):
    return Breakers(mode, clock=clock)


def counted(name, state):
    return REGISTRY.get_sample_value("esper_breaker_moves_total", {"breaker": name, "state": state}) or 0.0


def fail(breaker, times):
    for _ in range(times):
        assert breaker.allow()
        breaker.record_failure()


def rest(mode):
    for _ in range(EXIT_SUCCESSES):
        mode.record_success()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_that_opens_is_told_and_holds_the_policy_back(breakers, mode, name):
    before = counted(name, "open")
    with capture_logs() as told:
        fail(breakers[name], CONFIGS[name].failures)
    assert [entry["event"] for entry in told] == ["breaker_moved", "conservative_entered"]
    assert (told[0]["breaker"], told[0]["after"], told[0]["priority"]) == (name, "OPEN", "HIGH")
    assert counted(name, "open") == before + 1
    assert (mode.enabled, mode.reason) == (True, f"{name}_breaker_open")


@pytest.mark.parametrize("name", CONFIGS)
def test_each_move_is_an_event_and_only_one_that_was_closed_and_opens_takes_the_emergency_lane(breakers, clock, name):
    heard = []
    stop = listen(heard.append)
    fail(breakers[name], CONFIGS[name].failures)
    clock.advance(CONFIGS[name].cool_down_seconds)
    fail(breakers[name], 1)
    clock.advance(CONFIGS[name].cool_down_seconds)
    for _ in range(CONFIGS[name].successes):
        assert breakers[name].allow()
        breakers[name].record_success()
    stop()
    moves = [e.attributes for packet in heard for e in packet.events if e.description == "breaker_moved"]
    assert [(move["before"], move["after"], move["priority"]) for move in moves] == [
        ("CLOSED", "OPEN", "HIGH"), ("OPEN", "HALF_OPEN", "NORMAL"), ("HALF_OPEN", "OPEN", "NORMAL"),
        ("OPEN", "HALF_OPEN", "NORMAL"), ("HALF_OPEN", "CLOSED", "NORMAL"),
    ]  # fmt: skip
    assert [move["reason"] for move in moves] == [f"{name}_breaker_{move['after'].lower()}" for move in moves]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_policy_is_held_back_while_it_is_open_and_not_for_ever(breakers, mode, clock, name):
    fail(breakers[name], CONFIGS[name].failures)
    mode._entered_at -= COOL_DOWN_SECONDS
    rest(mode)
    assert mode.enabled
    clock.advance(CONFIGS[name].cool_down_seconds)
    rest(mode)
    assert not mode.enabled
    fail(breakers[name], 1)
    assert mode.enabled


def test_two_causes_must_both_be_over(breakers, mode, clock):
    fail(breakers[JOURNAL], FAILURES)
    fail(breakers[URZA], FAILURES)
    clock.advance(COOL_DOWN_SECONDS)
    rest(mode)
    assert mode.enabled
    clock.advance(CONFIGS[URZA].cool_down_seconds)
    rest(mode)
    assert not mode.enabled


def test_another_thread_may_enter_while_it_is_looked_whether_all_is_over(mode, clock):
    entered = []

    def is_over():
        entering = threading.Thread(target=mode.enter, args=("another",), daemon=True)
        entering.start()
        entering.join(5)
        entered.append(not entering.is_alive())
        return True

    mode.enter("one", until=is_over)
    clock.advance(COOL_DOWN_SECONDS)
    rest(mode)
    assert entered == [True]
    assert (mode.enabled, mode.reason) == (True, "another")


def test_every_breaker_is_shown(controller):
    pipeline = controller.pipeline
    for _ in range(FAILURES):
        pipeline.breakers[URZA].record_failure()
    asyncio.run(pipeline.tell_restraint())
    shown = {name: REGISTRY.get_sample_value("esper_breaker_state", {"breaker": name}) for name in CONFIGS}
    assert shown == dict.fromkeys(CONFIGS, CLOSED) | {URZA: OPEN}


class Library:
    """Urza, or nobody there."""

    def __init__(self):
        self.is_away, self.asked = True, 0

    async def list_blueprints(self, request, *, timeout=1.0):
        self.asked += 1
        if self.is_away:
            raise Unavailable("Nobody is there.")
        return ListBlueprintsResponse()


async def test_a_library_that_is_late_with_extras_is_asked_again_and_the_old_content_stays(breakers):
    class Busy(Library):
        async def list_blueprints(self, request, *, timeout=1.0):
            self.asked += 1
            return ListBlueprintsResponse(blueprints=[Blueprint()])

        async def batch_get_extras(self, request, *, timeout=1.0):
            raise DeadlineExceeded("Busy.")

    cache, library = BlueprintCache(breakers[URZA]), Busy()
    for _ in range(2 * FAILURES):
        assert not await cache.refresh(library)
    assert (library.asked, len(cache), breakers[URZA].state) == (2 * FAILURES, 0, CLOSED)


class Forgetful(Library):
    """Has one blueprint, and does not answer what it is silent about."""

    silent_about = ""

    async def list_blueprints(self, request, *, timeout=1.0):
        return self._answer("catalogue", ListBlueprintsResponse(blueprints=[Blueprint()]))

    async def batch_get_extras(self, request, *, timeout=1.0):
        return self._answer("extras", BatchGetExtrasResponse())

    def _answer(self, wanted, answer):
        if wanted == self.silent_about:
            raise DeadlineExceeded("Silent.")
        return answer


@pytest.mark.parametrize(("wanted", "budget_ms"), [("catalogue", "200.0"), ("extras", "20.0")])
async def test_a_silence_of_the_library_is_counted_each_time_and_told_once_until_it_is_over(wanted, budget_ms):
    def timeouts():
        return REGISTRY.get_sample_value("esper_urza_timeouts_total", {"wanted": wanted}) or 0.0

    library, heard, before = Forgetful(), [], timeouts()
    stop = listen(heard.append)
    cache = BlueprintCache(CircuitBreaker(config=BreakerConfig(cool_down_seconds=0)))
    for silences in (1, 2):
        library.silent_about = wanted
        cache.replace_with([], BatchGetExtrasResponse())  # What is here is not asked for again.
        assert [await cache.refresh(library) for _ in range(4)] == [False] * 4
        assert (len(heard), timeouts()) == (silences, before + 4 * silences)
        library.silent_about = ""
        assert await cache.refresh(library)
    stop()
    assert {packet.level for packet in heard} == {TelemetryLevel.TELEMETRY_LEVEL_ERROR}
    (told,) = heard[0].events
    assert (told.description, told.attributes["reason"], told.attributes["priority"]) == (
        "timeout_urza", "DEADLINE_EXCEEDED", "HIGH",
    )  # fmt: skip
    assert (told.attributes["wanted"], told.attributes["metadata_timeout_budget_ms"]) == (wanted, budget_ms)


async def test_a_library_that_is_away_is_left_alone_for_a_while(breakers, clock):
    cache, library = BlueprintCache(breakers[URZA]), Library()
    for _ in range(10):
        assert not await cache.refresh(library)
    assert library.asked == FAILURES
    library.is_away = False
    clock.advance(CONFIGS[URZA].cool_down_seconds)
    assert await cache.refresh(library)
    assert breakers[URZA].state == CLOSED


async def test_a_publisher_that_is_away_costs_other_reports_none_of_their_attempts(breakers, clock):
    seen, attempts, is_away = [], {}, True

    async def publish(report):
        if is_away:
            raise Unavailable("Nobody is there.")
        seen.append(report.report_id)

    outbox = Outbox(
        SimpleNamespace(publish=publish), ReportConfig(), note_attempts=attempts.__setitem__, clock=clock,
        breaker=breakers[FIELD_REPORTS],
    )  # fmt: skip
    outbox.add(FieldReport(report_id="first"))
    for _ in range(4):
        assert await outbox.publish_due() == 0
        clock.advance(1)
    assert breakers[FIELD_REPORTS].state == OPEN
    outbox.add(FieldReport(report_id="second"))
    assert await outbox.publish_due() == 0
    assert attempts == {"first": 3}
    is_away = False
    clock.advance(CONFIGS[FIELD_REPORTS].cool_down_seconds)
    assert await outbox.publish_due() == 1
    assert (seen, breakers[FIELD_REPORTS].state) == (["second"], CLOSED)


def test_a_journal_that_fails_is_left_alone_and_written_again_after_a_second(breakers, clock, tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.sqlite", breaker=breakers[JOURNAL])
    asked, trim = [], journal._trim

    def full(_connection):
        asked.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(journal, "_trim", full)
    for number in range(10):
        assert not journal.keep("kind", str(number), b"x")
    assert (len(asked), journal.dropped, breakers[JOURNAL].state) == (FAILURES, 10, OPEN)
    monkeypatch.setattr(journal, "_trim", trim)
    clock.advance(CONFIGS[JOURNAL].cool_down_seconds)
    assert journal.keep("kind", "after", b"x")
    assert breakers[JOURNAL].state == CLOSED
    journal.close()


async def test_state_files_that_cannot_be_written_are_left_alone_for_a_while(breakers, clock, tmp_path, monkeypatch):
    state, asked = LastingState(tmp_path, breaker=breakers[STATE_FILES]), []

    def full(_parts):
        asked.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.norms, "save", full)
    for _ in range(10):
        await state.save()
    assert len(asked) == FAILURES
    clock.advance(CONFIGS[STATE_FILES].cool_down_seconds)
    await state.save()
    assert len(asked) == FAILURES + 1
