"""Packets that make no sense: bounded work, a decision or a clear error, and a coverage that tells the truth."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest
from google.rpc import error_details_pb2

from esper_rpc.proto.leyline.v1 import HardwareContext, SeedState, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsResponse
from esper_servers.policy import sample

NAN, INF = math.nan, math.inf
METRICS = ("loss", "gradient_norm", "samples_per_s", "hook_latency_ms", "loss_delta", "loss_volatility")
STEP_NODES = ("node.seed", "node.global")


def seeds_of(value, stage=Stage.SEED_LIFECYCLE_STAGE_TRAINING):
    return [
        SeedState(
            seed_id=seed.seed_id, stage=stage, gradient_norm=value, learning_rate=value,
            metrics={"alpha": value, "steps_in_stage": value},
        )
        for seed in sample.sample_seeds()
    ]  # fmt: skip


def full_of(value):
    return SystemStatePacket(
        training_metrics=dict.fromkeys(METRICS, value), training_loss=value, validation_loss=value,
        validation_accuracy=value, seed_states=seeds_of(value),
        hardware_context=HardwareContext(device_type="cuda", total_memory_gb=value, available_memory_gb=value),
    )  # fmt: skip


def with_seeds(count):
    states = [SeedState(seed_id=f"other-{i}", stage=Stage.SEED_LIFECYCLE_STAGE_TRAINING) for i in range(count)]
    return SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=states)


ODD = {
    "nothing": SystemStatePacket(),
    "NaN everywhere": full_of(NAN),
    "infinity everywhere": full_of(INF),
    "minus infinity everywhere": full_of(-INF),
    "the largest numbers": full_of(3.4e38),
    "10 000 seeds": with_seeds(10_000),
    "unknown stages": SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=seeds_of(0.1, stage=99)),
    "a negative stage": SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=seeds_of(0.1, stage=-7)),
    "one seed ten times": SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=seeds_of(0.1) * 10),
    "the last moment of time": SystemStatePacket(
        training_metrics={"loss": 0.5}, current_epoch=2**32 - 1, global_step=2**64 - 1, timestamp_ns=2**64 - 1
    ),
}


def ask(controller, sequence, packet):
    raw = asyncio.run(controller.pipeline.evaluate_in_band(controller.request(sequence, packet), controller.owner))
    controller.pipeline.report()
    return EvaluateStepsResponse.FromString(raw).decision


@pytest.mark.parametrize("packet", ODD.values(), ids=ODD.keys())
def test_whatever_a_packet_says_there_is_a_decision_and_the_next_step_is_decided_too(controller, packet):
    for sequence in range(1, 5):
        decision = ask(controller, sequence, packet)
        assert decision.WhichOneof("decision") in ("command", "no_action")
    usual = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.5)
    assert ask(controller, 9, usual).WhichOneof("decision") in ("command", "no_action")


@pytest.mark.parametrize("packet", ODD.values(), ids=ODD.keys())
def test_coverage_counts_what_is_a_number_and_nothing_else(controller, packet):
    graph = controller.pipeline.runs.find("run").graph
    ask(controller, 1, controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, **dict.fromkeys(METRICS, 0.5)))
    before = graph.coverage()
    ask(controller, 2, packet)
    after = graph.coverage()
    shares = [after.overall, *after.types.values(), *after.features.values()]
    assert all(0 <= share <= 1 for share in shares)
    assert after.overall < before.overall
    is_blank = not any(math.isfinite(value) for value in packet.training_metrics.values())
    assert (after.types["node.global"] == 0) == is_blank


@pytest.mark.parametrize("stage", [0, 12, 99, -7])
def test_a_stage_that_nobody_knows_counts_as_unknown(controller, stage):
    graph = controller.pipeline.runs.find("run").graph
    ask(controller, 1, SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=seeds_of(0.1, stage=stage)))
    assert graph.coverage().features["seed.stage"] == 0.0
    ask(controller, 2, SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=seeds_of(0.1, stage=11)))
    assert "seed.stage" not in graph.coverage().features


def test_ten_thousand_seeds_cost_a_bounded_time(controller):
    packet = with_seeds(10_000)
    ask(controller, 1, packet)
    begun = time.process_time()
    ask(controller, 2, packet)
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize(
    ("packet", "field"),
    [
        (with_seeds(10_001), "seed_states"),
        (SystemStatePacket(seed_states=[SeedState(seed_id="seed-0", risk_score=NAN)]), "seed_states[0].risk_score"),
        (SystemStatePacket(training_metrics={f"m{i}": 0.0 for i in range(257)}), "training_metrics"),
    ],
    ids=["10 001 seeds", "a risk of NaN", "257 metrics"],
)
def test_what_the_contract_does_not_allow_is_refused_by_its_field(controller, packet, field):
    error = ask(controller, 1, packet).error
    bad = error_details_pb2.BadRequest()
    assert error.code == 3
    assert any(detail.Unpack(bad) for detail in error.details)
    assert bad.field_violations[0].field == f"step.packet.{field}"


@pytest.mark.parametrize("days", [-400, 400])
def test_a_wall_clock_that_leaps_at_every_look_moves_no_budget(controller, monkeypatch, days):
    usual, wall_ns, looks = (
        controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.5),
        time.time_ns,
        itertools.count(),
    )

    def leaping_ns():
        return wall_ns() + next(looks) * days * 86_400 * 10**9

    monkeypatch.setattr(time, "time_ns", leaping_ns)
    monkeypatch.setattr(time, "time", lambda: leaping_ns() / 1e9)
    decision = ask(controller, 1, usual)
    assert decision.no_action.reason == "nominal"
    assert 0 < decision.ledger.total_us < 5_000_000
