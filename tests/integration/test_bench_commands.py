"""The benchmarks against a Tamiyo that runs; what they find is not judged here."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from esper_rpc.proto.tamiyo.v1 import StepLedger
from esper_servers.cli.bench import emergency, growth, overhead
from esper_servers.cli.bench.growth import Size
from esper_servers.cli.bench.measure import at_once
from esper_servers.cli.bench.memory_share import memory_share
from esper_servers.cli.bench.step import StepBench
from esper_servers.cli.bench.timed_training import StepTime

WIDE_GUARD_MS = 1000.0
"""No step is missed because the machine is busy."""


@pytest.fixture
def mesh(shared_mesh):
    return shared_mesh


def test_growth_tells_the_parts_of_a_step_and_the_graph_of_each_size(mesh):
    axes = {"seeds": (Size(seeds=6),), "runs": (Size(runs=3),)}
    found = asyncio.run(growth.measure(mesh.home, mesh.addresses["tamiyo"], axes))
    [six], [three] = found["seeds"], found["runs"]
    assert (six["seeds"], three["runs"], six["plan"]) == (6, 3, "eager")
    assert six["nodes"] >= three["nodes"] + 2  # Two seeds, and what grows in them.
    for row in (six, three):
        assert all(0 <= row[part]["p50_ms"] <= row["total"]["p50_ms"] for part in growth.PARTS)
        assert row["inference"]["p50_ms"] > 0
        assert row["open_run"]["p95_ms"] >= row["open_run"]["p50_ms"] > 0
        assert row["first_step"]["p50_ms"] > 0


def test_the_records_of_steps_account_for_their_time(mesh):
    bench = StepBench(mesh.home, mesh.addresses["tamiyo"], WIDE_GUARD_MS)
    with bench.session:
        records = bench.records(30, at_once, mesh.services["tamiyo"].process.pid)
    assert len(records) == 30
    for record in records:
        assert sum(record.parts_ms.values()) == pytest.approx(record.total_ms, abs=0.01)
        assert record.parts_ms["signing"] > 0 or not record.command
    assert any(record.parts_ms["inference"] > 0 for record in records)


def test_a_step_without_an_answer_has_no_ledger(mesh):
    bench = StepBench(mesh.home, mesh.addresses["tamiyo"], WIDE_GUARD_MS)
    pid = mesh.services["tamiyo"].process.pid
    with bench.session as session:
        bench.latencies(1, at_once)
        assert session.last_ledger.total_us > 0
        os.kill(pid, signal.SIGSTOP)
        try:
            session.step(0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert session.reasons["deadline_missed"] > 0
        assert session.last_ledger == StepLedger()


def test_every_process_of_a_run_stands_still_by_an_alarm_and_by_a_signal(mesh):
    found = emergency.measure(mesh.home, processes=2, rounds=3, step_ms=1.0)
    for way in ("alarm", "signal"):
        assert 0 < found[way]["frozen"]["p50_ms"] <= found[way]["all_frozen"]["max_ms"]
        assert 0 <= found[way]["over_target_share"] <= 1


def test_overhead_compares_blocks_of_four_kinds(mesh, monkeypatch):
    monkeypatch.setattr(overhead, "LEAST_ROUNDS", 2)
    found = overhead.measure(mesh.home, 5, seconds=0.0)
    assert sum(found["answers"].values()) >= 2 * overhead.BLOCK_STEPS
    assert (found["seeds"], found["rounds"]) == (4, 2)
    assert all(found[kind]["p50_ms"] > found["session"].get(kind, {"p50_ms": 0})["p50_ms"] for kind in overhead.KINDS)
    assert all(found["session"][kind]["processor"]["p50_ms"] > 0 for kind in (overhead.ASKING, overhead.AHEAD))


def test_what_a_mesh_adds_to_the_memory_of_a_trainer_is_told(mesh):
    found = memory_share(mesh.home, os.environ, steps=3, width=64)
    assert found["percent"] == pytest.approx(100 * found["added_mb"] / found["plain_mb"], abs=0.01)
    assert found["added_mb"] > 0
    assert found["answered"] >= 1


def test_overhead_is_told_as_a_share_of_the_plain_step():
    times = overhead.Times()
    for kind, values in {
        "plain": [10.0, 20.0],
        "silent": [11.0, 22.0],
        "asking": [12.0, 24.5],
        "ahead": [11.5, 23.0],
    }.items():
        for value in values:
            times.add(kind, [StepTime(value, value / 10, value / 20)] * 3)
    found = times.figures()
    assert found["overhead_percent"] == pytest.approx(11.25)
    assert found["overhead_interval"] == {"low": 10.0, "high": 12.5}
    assert found["ahead_percent"] == pytest.approx(5.0)
    assert found["with_seeds_percent"] == pytest.approx(21.25)
    assert found["session"]["asking"]["percent"] == pytest.approx(100 * 1.2 / 15)
    assert found["session"]["asking"]["processor"]["p50_ms"] == pytest.approx(0.6)
