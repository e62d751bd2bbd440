from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2

from esper_client import TamiyoClient
from esper_rpc import errors
from esper_rpc.channel import open_channel
from esper_rpc.envelope import Verifier
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateEpochRequest,
    EvaluateStepRequest,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    ExplainDecisionRequest,
    GetPolicyRequest,
    GetStatusRequest,
    OpenRunRequest,
    ReplayDecisionRequest,
    SetConservativeModeRequest,
    Step,
)
from esper_rpc.proto.urza.v1 import BatchGetExtrasResponse, BlueprintExtras
from esper_rpc.server import Call
from esper_rpc.testing import TAMIYO, FakeTamiyo, serving
from esper_servers.policy import sample
from esper_servers.policy.vocabularies import SCHEDULES
from esper_servers.tamiyo import pipeline as pipeline_module
from esper_servers.tamiyo.commands import COVERAGE_KEYS
from esper_servers.tamiyo.conservative_mode import COOL_DOWN_SECONDS, EXIT_SUCCESSES
from esper_servers.tamiyo.run_state import build_graph
from esper_servers.urza.seeding import installed_blueprints

SERVICE = "esper.tamiyo.v1.TamiyoService"
OWNER = "spiffe://esper/trainer/local"
EPOCH = bytes(range(16))


def open_run(run_id="run", **fields):
    defaults = {
        "protocol_versions": [1], "receiver_epoch": EPOCH, "features": ["seed", "pause", "optimizer"],
        "sites": sample.sample_sites(), "seeds": sample.sample_seeds(),
    }  # fmt: skip
    return OpenRunRequest(run_id=run_id, **(defaults | fields))


def step(
    sequence, *, loss=0.5, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, budget_us=5_000_000, run_id="run", metrics=()
):
    told = {"loss": loss} | dict(metrics)
    packet = SystemStatePacket(training_metrics=told, seed_states=sample.sample_states(stage))
    return EvaluateStepRequest(step=Step(run_id=run_id, sequence=sequence, budget_us=budget_us, packet=packet))


@pytest.fixture
def run(pipeline):
    catalogue = [request.blueprint for request in installed_blueprints()]
    pipeline._blueprints.replace_with(catalogue, BatchGetExtrasResponse())
    pipeline.runs.open(open_run(), OWNER, pipeline._blueprints.candidates(sample.sample_sites()), 1)
    return pipeline


def decide(pipeline, request):
    return answer(pipeline, request.SerializeToString())


def answer(pipeline, raw):
    return EvaluateStepsResponse.FromString(asyncio.run(pipeline.evaluate_in_band(raw, OWNER))).decision


def command_of(decision):
    return AdaptationCommand.FromString(decision.command.payload)


def test_a_command_is_signed_for_its_request_and_the_host_accepts_it(run, mesh):
    request = step(1)
    decision = decide(run, request)
    verifier = Verifier(keyring=mesh.keyring("trainer"), audience=OWNER, receiver_epoch=EPOCH)
    digest = hashlib.sha256(request.SerializeToString()).digest()
    accepted = verifier.verify(decision.command, expected_sequence=1, expected_digest=digest)
    command = AdaptationCommand.FromString(accepted.payload)
    assert command.seed_operation.operation == Operation.SEED_OPERATION_START_TRAINING
    assert command.command_id == decision.command.nonce


def test_a_germination_names_a_blueprint_that_fits(run):
    for sequence in range(1, 100):
        decision = decide(run, step(sequence, stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT))
        if decision.HasField("command"):
            break
    operation = command_of(decision).seed_operation
    assert operation.operation == Operation.SEED_OPERATION_GERMINATE
    assert operation.blueprint_id in {
        "residual_mlp",
        "bottleneck_adapter",
        "lora_linear",
        "norm_affine",
        "gated_residual",
    }


def test_annotations_tell_coverage_policy_and_method(run):
    annotations = command_of(decide(run, step(1))).annotations
    assert {"feature_coverage", "policy_version", "blending_method_index", "blending_method", "reason"} <= set(
        annotations
    )
    assert 0 < float(annotations["feature_coverage"]) < 1
    assert {"node.seed", "node.global", "edges.seed_monitors"} <= set(json.loads(annotations["coverage_types"]))
    least_known = list(json.loads(annotations["coverage_map"]).values())
    assert 0 < len(least_known) <= COVERAGE_KEYS
    assert least_known == sorted(least_known)


def test_the_method_is_told_in_both_places_and_the_schedule_is_a_pair_in_order(run):
    command = command_of(decide(run, step(1)))
    parameters = command.seed_operation.parameters
    assert 0.0 <= parameters["blending_schedule_start"] <= parameters["blending_schedule_end"] <= 1.0
    index = int(parameters["blending_method_index"])
    assert (command.annotations["blending_method_index"], command.annotations["blending_method"]) == (
        str(index), SCHEDULES[index],
    )  # fmt: skip


def test_the_ledger_accounts_for_the_time(run):
    ledger = decide(run, step(1)).ledger
    parts = ledger.queue_us + ledger.validate_us + ledger.features_us + ledger.inference_us + ledger.risk_us
    assert 0 < parts <= ledger.total_us


def test_the_same_step_again_gets_the_identical_answer(run):
    first = decide(run, step(1))
    assert decide(run, step(1)) == first


def test_another_step_under_a_used_sequence_is_refused_in_band(run):
    decide(run, step(1))
    assert decide(run, step(1, loss=0.6)).error.code == 9


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff\xff\xff", 3),
        (EvaluateStepsRequest(step={}).SerializeToString(), 3),
        (step(1, run_id="unknown").SerializeToString(), 5),
    ],
    ids=["not protobuf", "empty", "unknown run"],
)
def test_a_bad_message_is_answered_in_band(run, raw, code):
    assert answer(run, raw).error.code == code


def test_the_in_band_error_names_field_and_rule(run):
    error = answer(run, b"\x0a\x00").error
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in error.details)
    assert bad.field_violations[0].field == "step.run_id"


def test_an_empty_message_is_a_greeting_and_gets_an_empty_decision(run):
    assert answer(run, b"").ByteSize() == 0


def test_another_identity_cannot_ask_for_the_run(run):
    raw = step(1).SerializeToString()
    with pytest.raises(errors.PermissionDenied):
        asyncio.run(run.evaluate(raw, "spiffe://esper/trainer/thief", time.perf_counter()))


def test_a_spent_budget_is_no_action(run):
    assert decide(run, step(1, budget_us=1)).no_action.reason == "budget_exhausted"


@pytest.mark.parametrize(
    ("loss", "reason"), [(math.nan, "loss_not_finite"), (math.inf, "loss_not_finite"), (9.0, "loss_spike")]
)
def test_a_loss_that_explodes_pauses_the_seeds(run, loss, reason):
    for sequence in range(1, 60):
        decide(run, step(sequence, loss=0.5, stage=Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED))
    command = command_of(decide(run, step(60, loss=loss)))
    assert command.command_type == CommandType.COMMAND_TYPE_PAUSE
    assert command.annotations["reason"] == reason


SLOW_APPLY = {"kasmina.apply_ms": 40.0}


def test_a_command_tells_the_risk_and_its_record_keeps_it(run):
    command = command_of(decide(run, step(1, metrics={"gradient_norm": 8.0})))
    assert command.annotations["risk_score"] == f"{0.2 * 0.3 / 0.5:.4f}"
    risk_map = json.loads(command.annotations["risk_map"])
    assert risk_map["gradient_norm"] == pytest.approx(0.2)
    assert "memory" not in risk_map
    run.report()
    assert run._decisions.explain(command.command_id).command.annotations == command.annotations


def test_a_drifting_run_has_its_optimizer_adjusted_where_a_seed_was_due_once_until_it_is_nominal(run):
    def answers(first, metrics):
        return [decide(run, step(first + i, metrics=metrics)) for i in range(60)]

    adjusted = [d for d in answers(1, SLOW_APPLY) if d.HasField("command")]
    assert [command_of(d).command_type for d in adjusted] == [CommandType.COMMAND_TYPE_OPTIMIZER]
    assert command_of(adjusted[0]).annotations["reason"] == "apply_latency"
    assert command_of(decide(run, step(61))).command_type == CommandType.COMMAND_TYPE_SEED
    assert command_of(decide(run, step(62, metrics=SLOW_APPLY))).command_type == CommandType.COMMAND_TYPE_OPTIMIZER


def test_without_a_due_seed_a_drifting_run_is_left_alone(run):
    fossil = Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED
    assert decide(run, step(1, stage=fossil, metrics=SLOW_APPLY)).no_action.reason == "apply_latency"


@pytest.mark.parametrize(("loss", "rate", "multiplier"), [(0.51, 1e-9, 1.25), (0.6, 1e-3, 0.8)])
def test_a_learning_rate_that_vanished_is_raised_and_a_drift_lowers_it(run, loss, rate, multiplier):
    decide(run, step(1, metrics={"optimizer_lr": rate}))
    adjustment = command_of(decide(run, step(2, loss=loss, metrics={"optimizer_lr": rate}))).optimizer_adjustment
    assert adjustment.hyperparameters["learning_rate_multiplier"] == pytest.approx(multiplier)


def test_a_step_without_a_loss_gets_no_seed_operation(run):
    packet = SystemStatePacket(seed_states=sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_GERMINATED))
    request = EvaluateStepRequest(step=Step(run_id="run", sequence=1, budget_us=5_000_000, packet=packet))
    assert decide(run, request).no_action.reason == "degraded_inputs"


def test_repeated_high_risk_holds_back_its_run_and_no_other(run):
    candidates = run._blueprints.candidates(sample.sample_sites())
    run.runs.open(open_run("calm"), OWNER, candidates, 1)
    with structlog.testing.capture_logs() as logs:
        for sequence in range(1, 4):
            decide(run, step(sequence, loss=math.nan))
        run.report()
    assert decide(run, step(4)).no_action.reason == "conservative_mode"
    assert decide(run, step(1, run_id="calm")).HasField("command")
    entered = [entry for entry in logs if entry["event"] == "conservative_entered"]
    assert [(e["reason"], e["run_id"], e["priority"]) for e in entered] == [("loss_not_finite", "run", "HIGH")]
    assert [e["priority"] for e in logs if e["event"] == "loss_not_finite"] == ["HIGH"]


def test_a_held_back_run_is_let_go_after_its_cool_down_and_enough_successes(run):
    held = run.runs.get("run", OWNER)
    for sequence in range(1, 4):
        decide(run, step(sequence, loss=math.nan))
    held.mode._entered_at -= COOL_DOWN_SECONDS
    with structlog.testing.capture_logs() as logs:
        reasons = [decide(run, step(4 + i)).no_action.reason for i in range(EXIT_SUCCESSES)]
    assert [(e["event"], e["run_id"]) for e in logs] == [("conservative_exited", "run")]
    assert reasons[:-1] == ["conservative_mode"] * (EXIT_SUCCESSES - 1)
    assert decide(run, step(100)).HasField("command")


def catalogue_with(sheet):
    requests = installed_blueprints()
    extras = json.dumps({"bsds": sheet}).encode()
    blueprints = [request.blueprint for request in requests]
    for blueprint in blueprints:
        blueprint.extras_digest = hashlib.sha256(extras).digest()
    told = [BlueprintExtras(blueprint_id=b.descriptor.blueprint_id, extras_json=extras) for b in blueprints]
    return blueprints, BatchGetExtrasResponse(extras=told)


@pytest.mark.parametrize(
    ("sheet", "kind", "reason", "is_held"),
    [
        ({"hazard_band": "CRITICAL"}, CommandType.COMMAND_TYPE_PAUSE, "bsds_hazard_critical", True),
        ({"handling_class": "QUARANTINE"}, CommandType.COMMAND_TYPE_PAUSE, "bsds_quarantine", True),
        ({"hazard_band": "HIGH"}, CommandType.COMMAND_TYPE_OPTIMIZER, "bsds_hazard_high", False),
    ],
)
def test_a_blueprint_that_turns_out_dangerous_is_answered_where_it_grows(run, sheet, kind, reason, is_held):
    seeds = sample.sample_seeds()
    seeds[0].blueprint_id = "residual_mlp"
    run.runs.open(open_run("grown", seeds=seeds), OWNER, run._blueprints.candidates(sample.sample_sites()), 1)
    run._blueprints.replace_with(*catalogue_with(sheet))
    asyncio.run(run.renew_graphs())
    with structlog.testing.capture_logs() as logs:
        command = command_of(decide(run, step(1, run_id="grown")))
        run.report()
    assert (command.command_type, command.annotations["reason"]) == (kind, reason)
    assert run.runs.get("grown", OWNER).mode.enabled == is_held
    assert [e["log_level"] for e in logs if e["event"] == reason] == ["critical" if is_held else "warning"]
    assert decide(run, step(1)).HasField("command")


def test_a_blueprint_is_remembered_from_the_command_that_planted_it(run):
    for sequence in range(1, 100):
        decision = decide(run, step(sequence, stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT))
        if decision.HasField("command"):
            break
    planted = command_of(decision)
    assert run.runs.get("run", OWNER).planted[planted.target_seed_id] == planted.seed_operation.blueprint_id


class Broken:
    version, digest, plan = "broken", b"", "eager"

    def __init__(self, behaviour):
        self.evaluate = behaviour

    def can_share(self, _inputs):
        return False


def raises(*_):
    raise RuntimeError("policy")


def test_a_policy_that_raises_gives_no_action_then_opens_the_breaker(run):
    run.policy = Broken(raises)
    reasons = [decide(run, step(i)).no_action.reason for i in range(1, 8)]
    assert reasons[:5] == ["inference_failed"] * 5
    assert reasons[6] in ("conservative_mode", "inference_breaker_open")
    assert run.mode.enabled


def test_a_policy_that_returns_nan_gives_no_action(run):
    genuine = run.policy.evaluate

    def poisoned(*arguments):
        output = genuine(*arguments)
        output.kind[:] = math.nan
        return output

    run.policy = Broken(poisoned)
    assert decide(run, step(1)).no_action.reason == "inference_failed"


@pytest.fixture
async def client(mesh, addresses):
    async with TamiyoClient(addresses[SERVICE][0], identity=mesh.identity("trainer")) as opened:
        yield opened


@pytest.fixture
async def operator(mesh, addresses):
    async with TamiyoClient(addresses[SERVICE][0], identity=mesh.identity("operator")) as opened:
        yield opened


async def test_the_graph_of_a_run_is_laid_out_while_the_steps_of_others_go_on(tamiyo, monkeypatch):
    threads = []

    def build(*arguments):
        threads.append(threading.get_ident())
        return build_graph(*arguments)

    monkeypatch.setattr(pipeline_module, "build_graph", build)
    await tamiyo.OpenRun(open_run(), Call("OpenRun", SpiffeId("trainer", "local")))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_run_opens_once_and_again_and_belongs_to_the_first(client, mesh, addresses):
    assert (await client.open_run(open_run())).created
    assert not (await client.open_run(open_run())).created
    async with TamiyoClient(addresses[SERVICE][0], identity=mesh.identity("trainer", "other")) as other:
        with pytest.raises(errors.PermissionDenied) as caught:
            await other.open_run(open_run())
    assert caught.value.reason == "NOT_THE_OWNER"


async def test_a_new_run_starts_from_the_norms_of_the_live_policy(client, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.policy, "norms", {"loss": (5.0, 2.0)})
    await client.open_run(open_run())
    assert pipeline.runs.find("run").graph.norms.moments["loss"] == (5.0, 2.0)


async def test_incompatible_peers_are_told_both_versions(client):
    with pytest.raises(errors.FailedPrecondition, match=r"protocol \[7\], this server \[1, 2\]"):
        await client.open_run(open_run(protocol_versions=[7]))


async def test_the_stream_goes_on_after_a_malformed_message(client, mesh, addresses):
    await client.open_run(open_run())
    channel = open_channel(addresses[SERVICE][0], identity=mesh.identity("trainer"), role="tamiyo")
    call = channel.stream_stream(f"/{SERVICE}/EvaluateSteps")()
    codes = []
    for raw in (b"\xff\xff", step(1).SerializeToString(), b"\x0a\x00", step(2).SerializeToString()):
        await call.write(raw)
        codes.append(EvaluateStepsResponse.FromString(await call.read()).decision.error.code)
    await call.done_writing()
    await channel.close()
    assert codes == [3, 0, 3, 0]


@pytest.mark.parametrize(("versions", "in_force"), [([1], 1), ([1, 2], 2), ([2, 9], 2)])
async def test_the_newest_common_protocol_is_in_force(client, versions, in_force):
    assert (await client.open_run(open_run(protocol_versions=versions))).protocol_version == in_force


@pytest.mark.parametrize(("versions", "is_told"), [([1], False), ([1, 2], True)])
async def test_only_a_client_that_knows_it_is_told_to_go_away(mesh, tamiyo, versions, is_told):
    async with serving(mesh.identity("tamiyo"), (TAMIYO, tamiyo), raw_methods=FakeTamiyo.RAW_METHODS) as server:
        async with TamiyoClient(server.address, identity=mesh.identity("trainer")) as client:
            await client.open_run(open_run(protocol_versions=versions))
            channel = open_channel(server.address, identity=mesh.identity("trainer"), role="tamiyo")
            call = channel.stream_stream(f"/{SERVICE}/EvaluateSteps")()
            await call.write(step(1).SerializeToString())
            await call.read()
            tamiyo.begin_drain()
            last = await call.read()
            assert (last is not grpc.aio.EOF) == is_told
            await channel.close()


async def test_the_unary_call_decides_like_the_stream(client):
    await client.open_run(open_run())
    response = await client.evaluate_step(step(1))
    assert command_of(response.decision).seed_operation.operation == Operation.SEED_OPERATION_START_TRAINING


async def test_an_epoch_is_decided_too(client):
    await client.open_run(open_run())
    request = EvaluateEpochRequest(run_id="run", sequence=1, packet=step(1).step.packet)
    assert (await client.evaluate_epoch(request)).decision.sequence == 1


async def test_the_decision_on_an_epoch_is_bound_to_the_bytes_that_were_sent(client):
    await client.open_run(open_run())
    request = EvaluateEpochRequest(run_id="run", sequence=1, packet=step(1).step.packet)
    decision = (await client.evaluate_epoch(request)).decision
    assert decision.command.request_digest == hashlib.sha256(request.SerializeToString()).digest()
    assert (await client.evaluate_epoch(request)).decision == decision


async def test_an_operator_reads_policy_status_and_the_record_of_a_decision(client, operator):
    await client.open_run(open_run())
    issued = command_of((await client.evaluate_step(step(1))).decision)
    assert "heuristic" in (await operator.get_policy(GetPolicyRequest())).origin
    status = await operator.get_status(GetStatusRequest())
    assert (status.runs[0].run_id, status.decisions["START_TRAINING"]) == ("run", 1)
    record = await operator.explain_decision(ExplainDecisionRequest(command_id=issued.command_id))
    assert record.command == issued
    assert record.packet == step(1).step.packet


@pytest.mark.parametrize("named", [{}, {"run_id": "run"}, {"sequence": 1}])
async def test_a_decision_is_named_by_its_command_or_by_run_and_sequence(operator, named):
    for ask, request in (
        (operator.explain_decision, ExplainDecisionRequest(**named)),
        (operator.replay_decision, ReplayDecisionRequest(**named)),
    ):
        with pytest.raises(errors.InvalidRequest, match="Name a command, or a run and the sequence"):
            await ask(request)


async def test_an_operator_sees_the_run_that_is_held_back_and_lets_it_go(client, operator):
    await client.open_run(open_run())
    for sequence in range(1, 4):
        await client.evaluate_step(step(sequence, loss=math.nan))
    status = await operator.get_status(GetStatusRequest())
    assert (status.conservative_mode, status.conservative_reason) == (True, "run run: loss_not_finite")
    await operator.set_conservative_mode(SetConservativeModeRequest(enabled=False, reason="test"))
    assert not (await operator.get_status(GetStatusRequest())).conservative_mode
    assert (await client.evaluate_step(step(4))).decision.HasField("command")


async def test_conservative_mode_by_hand_stops_seeds_until_it_is_left(client, operator):
    await client.open_run(open_run())
    await operator.set_conservative_mode(SetConservativeModeRequest(enabled=True, reason="test"))
    held = (await client.evaluate_step(step(1))).decision
    await operator.set_conservative_mode(SetConservativeModeRequest(enabled=False, reason="test"))
    freed = (await client.evaluate_step(step(2))).decision
    assert held.no_action.reason == "conservative_mode"
    assert freed.HasField("command")
