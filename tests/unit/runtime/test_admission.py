from __future__ import annotations

import json
import queue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc import audit
from esper_rpc.audit import AuditLog
from esper_rpc.concurrency import BULK, EPOCH, STEP, ConcurrencyConfig, ConcurrencyLimit
from esper_rpc.errors import ResourceExhausted
from esper_rpc.quota import QuotaConfig, Quotas
from esper_rpc.testing import FakeClock


def test_a_quota_refuses_beyond_the_burst_and_says_when_to_come_back():
    clock = FakeClock()
    quotas = Quotas(QuotaConfig(calls_per_second=10, burst=3), clock)
    for _ in range(3):
        quotas.take("a")
    with pytest.raises(ResourceExhausted) as caught:
        quotas.take("a")
    assert (caught.value.reason, caught.value.retry_after_ms) == ("QUOTA_CALLS", 100)
    clock.advance(0.1001)
    quotas.take("a")


def test_a_quiet_time_earns_no_more_than_the_burst():
    clock = FakeClock()
    quotas = Quotas(QuotaConfig(calls_per_second=10, burst=3), clock)
    quotas.take("a")
    clock.advance(3600)
    for _ in range(3):
        quotas.take("a")
    with pytest.raises(ResourceExhausted):
        quotas.take("a")


def test_one_identity_does_not_use_up_the_quota_of_another():
    quotas = Quotas(QuotaConfig(calls_per_second=1, burst=1), FakeClock())
    quotas.take("a")
    quotas.take("b")


def test_streams_are_counted_until_they_close():
    quotas = Quotas(QuotaConfig(streams=1), FakeClock())
    quotas.open_stream("a")
    with pytest.raises(ResourceExhausted, match="streams open"):
        quotas.open_stream("a")
    quotas.close_stream("a")
    quotas.open_stream("a")


def test_identities_that_never_come_back_are_forgotten():
    quotas = Quotas(QuotaConfig(streams=1), clock=FakeClock())
    quotas.open_stream("kept")
    for number in range(10_000):
        quotas.take(f"passer-by {number}")
    assert len(quotas._accounts) <= 4097
    with pytest.raises(ResourceExhausted):
        quotas.open_stream("kept")
    quotas.close_stream("kept")


def test_bulk_gives_way_first_and_a_step_last():
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=10, least=10, most=10), FakeClock())
    admitted = dict.fromkeys((BULK, EPOCH, STEP), 0)
    for rank in admitted:
        with pytest.raises(ResourceExhausted):
            while True:
                limit.acquire(rank)
                admitted[rank] += 1
    assert admitted == {BULK: 5, EPOCH: 3, STEP: 2}
    assert limit.refused == 3


def served(limit, clock, seconds, calls):
    for _ in range(calls):
        places = []
        with pytest.raises(ResourceExhausted):
            while True:
                places.append(limit.acquire(STEP))
        clock.advance(seconds)
        for place in places:
            limit.release(place)


def test_the_limit_shrinks_when_latency_grows_and_recovers():
    clock = FakeClock()
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=50, least=4, most=100), clock)
    served(limit, clock, 0.001, 40)
    healthy = limit.limit
    served(limit, clock, 0.1, 1)
    overloaded = limit.limit
    served(limit, clock, 0.001, 200)
    assert overloaded < healthy
    assert limit.limit > overloaded


@given(st.lists(st.floats(0, 10, allow_nan=False), max_size=200))
def test_the_limit_stays_in_its_bounds_and_places_are_conserved(latencies):
    clock = FakeClock()
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=8, least=4, most=16), clock)
    for seconds in latencies:
        place = limit.acquire(STEP)
        clock.advance(seconds)
        limit.release(place)
        assert 4 <= limit.limit <= 16
    assert limit.in_flight == 0


def test_the_limit_falls_no_lower_than_its_least():
    clock = FakeClock()
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=16, least=8, most=16), clock)
    for exponent in range(10):
        places = [limit.acquire(STEP) for _ in range(limit.limit)]
        clock.advance(1e-3 * 10**exponent)
        for place in places:
            limit.release(place)
    assert limit.limit == 8


def test_an_overload_that_is_over_is_soon_forgotten_in_the_advice_when_to_come_back():
    clock = FakeClock()
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=1, least=1, most=1), clock)
    for seconds in (*[1.0] * 600, *[0.001] * 100):
        place = limit.acquire(STEP)
        clock.advance(seconds)
        limit.release(place)
    limit.acquire(STEP)
    with pytest.raises(ResourceExhausted) as caught:
        limit.acquire(STEP)
    assert caught.value.retry_after_ms < 100


def test_calls_that_hardly_use_the_limit_leave_it_as_it_is():
    clock = FakeClock()
    limit = ConcurrencyLimit(ConcurrencyConfig(initial=64), clock)
    for seconds in (0.001, 0.001, 10.0):
        place = limit.acquire(STEP)
        clock.advance(seconds)
        limit.release(place)
    assert limit.limit == 64


def test_refusals_and_admin_calls_are_written_and_a_flood_is_written_once(tmp_path):
    clock = FakeClock()
    trail = AuditLog(tmp_path / "audit" / "log.jsonl", clock=clock)
    for _ in range(1000):
        trail.refused("a", "/m", "DENIED")
    clock.advance(1.5)
    trail.refused("a", "/m", "DENIED")
    trail.admitted("operator", "/n")
    trail.close()
    lines = [json.loads(line) for line in (tmp_path / "audit" / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("repeated_before")) for line in lines] == [
        ("refused", 0), ("refused", 999), ("admin_call", None),
    ]  # fmt: skip


def test_causes_are_bounded_and_the_one_that_was_longest_quiet_goes_first(monkeypatch):
    monkeypatch.setattr(audit, "CAUSES_KEPT", 2)
    clock = FakeClock()
    trail = AuditLog(clock=clock)
    for seconds, peers in ((0, "a"), (0.6, "b"), (0.6, "ac")):
        clock.advance(seconds)
        for peer in peers:
            trail.refused(peer, "/m", "DENIED")
    with capture_logs() as logs:
        for peer in "acb":
            trail.refused(peer, "/m", "DENIED")
    assert [entry["peer"] for entry in logs] == ["b"]


def lost():
    return REGISTRY.get_sample_value("esper_audit_records_lost_total", {"cause": "queue"})


def test_what_the_queue_does_not_take_is_counted_as_lost(tmp_path):
    trail = AuditLog(tmp_path / "log.jsonl")
    trail._records, before = queue.Queue(1), lost()
    for peer in "abc":
        trail.refused(peer, "/m", "DENIED")
    trail.close()
    assert lost() - before == 2
