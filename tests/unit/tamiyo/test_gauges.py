from __future__ import annotations

import asyncio
import gc
import math

import pytest
from prometheus_client import REGISTRY

from esper_rpc.breaker import BreakerConfig
from esper_rpc.proto.leyline.v1 import CircuitState, SeedOperation, SystemStatePacket, TelemetryLevel
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import RunSeed
from esper_rpc.telemetry.events import listen
from esper_servers.policy import sample
from esper_servers.policy.prior import PriorConfig
from esper_servers.policy.vocabularies import SCHEDULES
from esper_servers.tamiyo import warm_up
from esper_servers.tamiyo.reporting import STEPS_PER_SAMPLE
from esper_servers.urza.seeding import installed_blueprints


def sample_of(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def grown(name):
    return [
        RunSeed(seed_id=seed.seed_id, site_id=seed.site_id, blueprint_id=name if index == 0 else "")
        for index, seed in enumerate(sample.sample_seeds())
    ]


def test_a_command_shows_the_coverage_that_it_was_annotated_with(controller):
    command_id = controller.step(1, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.6, gradient_norm=0.5)
    annotations = controller.decisions.explain(command_id).command.annotations
    assert sample_of("esper_feature_coverage") == pytest.approx(float(annotations["feature_coverage"]))
    types = controller.pipeline.runs.find("run").graph.coverage().types
    assert {name: sample_of("esper_feature_coverage_by_type", type=name) for name in types} == types


def test_of_steps_without_a_command_one_in_a_hundred_is_looked_at(controller, monkeypatch):
    run, looked = controller.pipeline.runs.find("run"), []
    coverage = run.graph.coverage
    monkeypatch.setattr(run.graph, "coverage", lambda: looked.append(run.steps) or coverage())
    assert controller.train(2 * STEPS_PER_SAMPLE) == []
    assert looked == [1, STEPS_PER_SAMPLE + 1]


def test_nothing_is_recorded_before_the_answer_has_left(controller):
    before = sample_of("esper_risk_score_count")
    assert controller.answer(1, SystemStatePacket(training_metrics={"loss": 0.5})) == ""
    assert sample_of("esper_risk_score_count") == before
    controller.pipeline.report()
    assert sample_of("esper_risk_score_count") == before + 1


def test_the_risk_of_a_step_is_recorded(controller):
    before = sample_of("esper_risk_score_sum")
    controller.step(1, loss=0.6, gradient_norm=20.0)
    assert sample_of("esper_risk_score_sum") > before + 0.2


@pytest.mark.parametrize("band", ["HIGH", "CRITICAL"])
def test_a_step_beside_a_dangerous_blueprint_is_counted_with_its_band_and_risk(controller, band):
    controller.fill_catalogue(bsds={"hazard_band": band, "risk_score": 0.7})
    controller.open(seeds=grown("residual_mlp"))
    hazards, risks = sample_of("esper_bsds_hazards_total", band=band), sample_of("esper_blueprint_risk_count")
    controller.step(1, stage=Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.6)
    assert sample_of("esper_bsds_hazards_total", band=band) == hazards + 1
    assert sample_of("esper_blueprint_risk_count") == risks + 1


def test_where_no_blueprint_lives_no_risk_of_one_is_recorded(controller):
    before = sample_of("esper_blueprint_risk_count")
    controller.train(3)
    assert sample_of("esper_blueprint_risk_count") == before


def test_blueprints_without_a_sheet_are_shown_and_the_sheets_of_a_new_catalogue_told(controller):
    names = len(list(installed_blueprints()))
    assert sample_of("esper_bsds_missing") == names
    heard = []
    stop = listen(heard.append)
    controller.fill_catalogue(colour="red")
    controller.fill_catalogue(bsds={"risk_score": 0.0})
    controller.fill_catalogue(bsds={"risk_score": 0.0})
    stop()
    assert sample_of("esper_bsds_missing") == 0
    ((event,),) = (packet.events for packet in heard)
    assert (event.description, event.level) == ("bsds_present", TelemetryLevel.TELEMETRY_LEVEL_INFO)
    assert (event.attributes["sheets"], event.attributes["missing"]) == (str(names), "0")


@pytest.mark.parametrize(("metrics", "demand"), [({"loss": 0.5}, "nothing"), ({"loss": math.nan}, "pause")])
def test_what_the_risk_of_a_step_demanded_is_counted(controller, metrics, demand):
    known = {"gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}
    before = sample_of("esper_risk_demands_total", demand=demand)
    controller.step(1, **known, **metrics)
    assert sample_of("esper_risk_demands_total", demand=demand) == before + 1


def test_a_graft_is_counted_with_its_method_and_no_other_command_is(controller):
    def counted():
        return {method: sample_of("esper_blending_methods_total", method=method) for method in SCHEDULES}

    before, packet = counted(), controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.5, gradient_norm=0.5)
    for seed in packet.seed_states:
        seed.metrics["steps_in_stage"] = PriorConfig().training_steps
    assert controller.step(1, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.5, gradient_norm=0.5)
    assert counted() == before
    command = controller.decisions.explain(controller.ask(2, packet)).command
    assert command.seed_operation.operation == SeedOperation.SEED_OPERATION_START_GRAFTING
    before[command.annotations["blending_method"]] += 1
    assert counted() == before


def test_a_step_on_a_stream_that_gets_an_error_is_counted_when_it_has_left(controller):
    before = sample_of("esper_steps_refused_total", reason="SEQUENCE_REPLAYED")
    controller.step(2, loss=0.5)
    controller.answer(1, SystemStatePacket())
    controller.answer(1, SystemStatePacket())
    assert sample_of("esper_steps_refused_total", reason="SEQUENCE_REPLAYED") == before
    controller.pipeline.report()
    controller.pipeline.report()
    assert sample_of("esper_steps_refused_total", reason="SEQUENCE_REPLAYED") == before + 2


def test_the_time_of_the_warm_up_is_shown(policy, monkeypatch):
    monkeypatch.setattr(gc, "freeze", lambda: None)
    warm_up.prepare(policy)
    assert sample_of("esper_plan_warm_up_seconds") > 0


def test_the_losses_of_a_step_are_shown(controller):
    told = SystemStatePacket(training_metrics={"loss": 0.5}, validation_loss=0.75)
    controller.ask(1, told)
    controller.step(2, loss=0.8)
    assert sample_of("esper_loss_delta") == pytest.approx(0.3)
    assert sample_of("esper_validation_loss") == 0.75
    controller.step(3, loss=0.8, loss_delta=-2.0)
    assert sample_of("esper_loss_delta") == -2.0


def test_what_holds_the_policy_back_is_shown(controller):
    pipeline = controller.pipeline

    def shown():
        asyncio.run(pipeline.tell_restraint())
        scopes = [sample_of("esper_conservative_mode", scope=scope) for scope in ("service", "runs")]
        return [*scopes, sample_of("esper_breaker_state", breaker="inference")]

    assert shown() == [0, 0, CircuitState.CIRCUIT_STATE_CLOSED]
    for sequence in range(1, 4):
        controller.step(sequence, loss=math.nan)
    assert shown() == [0, 1, CircuitState.CIRCUIT_STATE_CLOSED]
    for _ in range(BreakerConfig().failures):
        pipeline.breaker.record_failure()
    assert shown() == [1, 1, CircuitState.CIRCUIT_STATE_OPEN]
