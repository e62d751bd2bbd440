from __future__ import annotations

import itertools

import pytest

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import CommandOutcome, HealthStatus
from esper_servers.kasmina import inbox, lifecycle
from esper_servers.kasmina.telemetry import step_packets

HEALTHY, DEGRADED, UNHEALTHY = (
    HealthStatus.HEALTH_STATUS_HEALTHY,
    HealthStatus.HEALTH_STATUS_DEGRADED,
    HealthStatus.HEALTH_STATUS_UNHEALTHY,
)


def metrics_of(packet):
    return {point.name.removeprefix("kasmina.seed."): point.value for point in packet.metrics}


def test_a_packet_of_a_seed_has_each_metric_with_the_name_of_the_seed(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(4)
    packet, overall = rig.host.finalize_step(99)
    assert {point.attributes["seed_id"] for point in packet.metrics} == {rig.seed_id}
    known = metrics_of(packet)
    assert set(known) == {*step_packets.SEED_METRICS, "isolation_violations"}
    assert (known["stage"], known["alpha_steps"], known["kernel_attached"]) == (lifecycle.BLENDING, 4, 1)
    assert known["last_kernel_latency_ms"] == rig.slot.site.hook_ms > 0
    assert overall.metrics[0].value == 1


def test_each_packet_is_its_own(rig):
    rig.grow(lifecycle.BLENDING)
    rig.seed_id = rig.seed_ids[0]
    rig.grow(lifecycle.TRAINING)
    rig.host.advance_alphas()
    kept = rig.host.finalize_step(98)
    before = [metrics_of(packet) for packet in kept]
    rig.host.advance_alphas()
    after = rig.host.finalize_step(99)
    assert [packet.packet_id for packet in after] == [f"{name}-99" for name in (*rig.seed_ids, "global")]
    assert [{point.attributes["seed_id"] for point in packet.metrics} for packet in after[:-1]] == [
        {seed_id} for seed_id in rig.seed_ids
    ]
    assert metrics_of(after[1])["alpha_steps"] == before[1]["alpha_steps"] + 1
    assert [metrics_of(packet) for packet in kept] == before


def test_a_metric_that_is_no_number_is_missed(rig):
    rig.grow(lifecycle.TRAINING)
    assert step_packets.untold(rig.slot) == []
    rig.slot.site.hook_ms = float("nan")
    assert step_packets.untold(rig.slot) == ["last_kernel_latency_ms"]


def test_every_move_is_an_event_with_both_stages(rig):
    rig.grow(lifecycle.BLENDING)
    rig.clock.advance(10)
    told = rig.told("seed_stage")
    assert [(move["before"], move["stage"]) for move in told][-1] == ("TRAINING", "BLENDING")
    assert told[-1]["seed_id"] == rig.seed_id


def test_a_host_is_healthy_until_something_stands_in_or_goes_wrong(rig):
    assert rig.host.health().status == HEALTHY
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    command = rig.command("START_GRAFTING")
    command.annotations["blend_mode"] = "NO_SUCH_MODE"
    rig.order(command)
    health = rig.host.health()
    assert (health.status, dict(health.indicators)) == (DEGRADED, {"fallback": rig.seed_id})
    rig.host.validate_parameters(rig.seed_id, rig.model[0].host.parameters())
    health = rig.host.finalize_step(1)[-1].system_health
    assert (health.status, health.summary) == (UNHEALTHY, "violations, fallback")


def test_a_slow_seed_makes_its_host_degraded_and_an_open_breaker_unhealthy(rig):
    rig.grow(lifecycle.TRAINING)
    rig.slot.site.hook_ms = 51.0
    assert rig.host.health().indicators["latency"] == rig.seed_id
    breaker = rig.host.breakers["kernel_loading"]
    for _ in range(10):
        breaker.record_failure()
    health = rig.host.health()
    assert (health.status, health.indicators["breaker_open"]) == (UNHEALTHY, "kernel_loading")


@pytest.mark.parametrize(("took", "is_late"), [(4.0, False), (6.0, True)])
def test_a_command_that_takes_longer_than_it_allows_is_told(rig, monkeypatch, took, is_late):
    ticks = itertools.count(step=took / 1e3)
    monkeypatch.setattr("esper_servers.kasmina.host.time.perf_counter", lambda: next(ticks))
    command = rig.command("GERMINATE", blueprint="residual_mlp")
    command.execution_deadline_ms = 5
    rig.order(command)
    told = rig.told("deadline_violation")
    assert [each["command_id"] for each in told] == ([command.command_id] if is_late else [])


def test_a_queue_that_is_full_refuses_and_tells(rig, monkeypatch):
    monkeypatch.setattr(inbox, "MOST_QUEUED", 1)
    first, second = rig.command("GERMINATE", blueprint="residual_mlp"), rig.command("CULL")
    assert rig.host.submit(rig.envelope(first)).result == CommandOutcome.RESULT_QUEUED
    refused = rig.host.submit(rig.envelope(second))
    assert (refused.result, refused.reason) == (CommandOutcome.RESULT_REJECTED, reasons.LOCAL_LIMIT)
    assert rig.told("seed_queue_dropped")[0]["command_id"] == second.command_id
    assert [outcome.command_id for outcome in rig.host.apply_pending()] == [first.command_id]
