from __future__ import annotations

import gc
from collections import Counter
from types import SimpleNamespace

import pytest

from esper_rpc.ledger import StepTiming, TimingWindow
from esper_rpc.proto.tamiyo.v1 import StepLedger
from esper_servers.cli.bench import tail
from esper_servers.cli.bench.tail import StepRecord, StepWatch, parts_of

TIMING = StepTiming(build=100, exchange=3000, server=2000, verify=30, apply=20, total=3150)


def record(total_ms, *, command=False, collecting_ms=0.0):
    return StepRecord(
        total_ms=total_ms, parts_ms={"wire": total_ms / 2, "inference": 1.0}, command=command, after_command=False,
        collecting_ms=collecting_ms, caller_waited_ms=0.0, tamiyo_waited_ms=0.0,
    )  # fmt: skip


def test_the_slowest_hundredth_stands_beside_the_tenth_around_the_median():
    records = [record(float(n), command=n >= 199, collecting_ms=4.0 * (n == 198)) for n in reversed(range(200))]
    found = tail.explain(records)
    assert found["slowest"] == {
        "steps": 2, "total_ms": 198.5, "parts_ms": {"wire": 99.25, "inference": 1.0}, "command": 0.5,
        "after_command": 0.0, "collecting_ms": 2.0, "caller_waited_ms": 0.0, "tamiyo_waited_ms": 0.0,
    }  # fmt: skip
    assert (found["median"]["steps"], found["median"]["total_ms"], found["median"]["command"]) == (20, 99.5, 0.0)


@pytest.mark.parametrize("count", [1, 2, 20, 99])
def test_a_few_steps_have_a_tail_too(count):
    found = tail.explain([record(float(n)) for n in range(count)])
    assert found["slowest"]["steps"] == 1
    assert found["slowest"]["total_ms"] == count - 1
    assert found["median"]["steps"] >= 1


def test_the_parts_of_a_step_are_all_of_it():
    ledger = StepLedger(queue_us=10, validate_us=90, features_us=100, inference_us=1500, risk_us=200, total_us=2000)
    parts = parts_of(3.25, TIMING, ledger)
    assert sum(parts.values()) == pytest.approx(3.25)
    assert {name: round(parts[name], 6) for name in ("wire", "inference", "rest", "other")} == {
        "wire": 1.0, "inference": 1.5, "rest": 0.1, "other": 0.1,
    }  # fmt: skip


def test_the_table_has_a_row_a_figure_and_a_column_a_group():
    rows = tail.table({"paced": tail.explain([record(2.0)])})
    assert {"figure": "wire", "paced median": 1.0, "paced slowest": 1.0} in rows


@pytest.fixture
def session():
    return SimpleNamespace(reasons=Counter(), timings=TimingWindow(), last_ledger=StepLedger())


@pytest.fixture
def _no_collector_of_its_own_accord():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector_of_its_own_accord")
def test_a_step_is_watched_for_what_falls_into_it(session):
    def with_a_command():
        gc.collect()
        session.reasons["command"] += 1
        session.timings.add(TIMING)
        return 3.2

    def without():
        session.timings.add(TIMING)
        return 3.2

    callbacks = list(gc.callbacks)
    with StepWatch(session, tamiyo_pid=1) as watch:
        first, second, third = watch.record(with_a_command), watch.record(without), watch.record(without)
    assert gc.callbacks == callbacks
    assert [each.command for each in (first, second, third)] == [True, False, False]
    assert [each.after_command for each in (first, second, third)] == [False, True, False]
    assert first.collecting_ms > 0
    assert second.collecting_ms == 0
    assert all(each.caller_waited_ms >= 0 for each in (first, second, third))


def test_a_kernel_that_tells_nothing_of_waiting_is_no_error(session):
    session.timings.add(TIMING)
    with StepWatch(session, tamiyo_pid=2**30) as watch:
        assert watch.record(lambda: 3.2).tamiyo_waited_ms == 0.0
