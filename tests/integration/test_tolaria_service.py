"""TolariaService beside an attached session, and `esper training`, over mutual TLS."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import importlib.util
import json
import os
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from esper_client import BlockingTolariaClient, MeshAddress, TolariaClient, connection, find_mesh
from esper_client.client import mesh_client
from esper_rpc.envelope.emergency import SignalVerifier, seal
from esper_rpc.errors import FailedPrecondition, PermissionDenied, ResourceExhausted
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    CommandType,
    EmergencyLevel,
    EmergencySignal,
    HealthStatus,
)
from esper_rpc.proto.tolaria.v1 import (
    CreateCheckpointRequest,
    GetStatusRequest,
    RollbackRequest,
    SignalEmergencyRequest,
    WatchEmergenciesRequest,
    WatchMetricsRequest,
)
from esper_rpc.server import Call
from esper_rpc.testing import TemporaryMesh, fake_mesh, serving
from esper_servers.cli import app
from esper_servers.cli.home import Home
from esper_servers.tolaria.emergency.shared_signal import SharedSignal, place_for
from esper_servers.tolaria.epoch_guard import EpochGuardConfig
from esper_servers.tolaria.metrics.feed import KEPT_STEPS, MetricsFeed
from esper_servers.tolaria.service import BACKLOG
from esper_servers.tolaria.train_step import TrainStep, TrainStepConfig
from esper_servers.trainer import DetachedSession, attach, orchestrate

HALT, NOTICE = EmergencyLevel.EMERGENCY_LEVEL_HALT, EmergencyLevel.EMERGENCY_LEVEL_NOTICE


def load_training_loop():
    place = Path(__file__).resolve().parents[1] / "contract" / "training_loop.py"
    spec = importlib.util.spec_from_file_location("training_loop", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


training_loop = load_training_loop()


@pytest.fixture
def mesh(tmp_path):
    return TemporaryMesh(tmp_path)


@pytest.fixture
async def served(mesh):
    """A loop that trains, and a client of an operator."""
    with training_loop.TrainingLoop(mesh.identity("trainer"), mesh.keyring("trainer")) as loop:
        async with serving(mesh.identity("trainer"), (training_loop.TOLARIA, loop.servicer)) as server:
            async with TolariaClient(server.address, identity=mesh.identity("operator")) as client:
                yield loop, client


def sealed(mesh, status, level, *, role="operator", lowers=False):
    signal = EmergencySignal(version=1, level=level, reason="test", origin=role)
    if lowers:
        signal.attributes["lowers"] = "true"
    return SignalEmergencyRequest(
        signal=seal(
            signal, keyring=mesh.keyring(role), audience=status.audience, run_id=status.run_id,
            issued_at_ns=time.time_ns(),
        )
    )  # fmt: skip


def copy_of(loop):
    return loop.model.weight.detach().clone()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_halt_of_an_operator_freezes_the_loop_and_a_calm_lets_it_go_on(served, mesh):
    loop, client = served
    status = await client.get_status(GetStatusRequest())
    answer = await client.signal_emergency(sealed(mesh, status, HALT))
    assert (answer.accepted, answer.is_halted) == (True, True)
    # At the end of its last step, or while it stands still: nothing changes from here on.
    at, weights = await asyncio.wrap_future(loop.safe_point.submit(lambda: (loop.global_step, copy_of(loop))))
    await client.create_checkpoint(CreateCheckpointRequest())
    found = await client.get_status(GetStatusRequest())
    assert (found.status, found.is_halted) == (HealthStatus.HEALTH_STATUS_CRITICAL, True)
    assert found.global_step == at
    assert torch.equal(weights, loop.model.weight)
    await client.signal_emergency(sealed(mesh, status, NOTICE, lowers=True))
    await until(lambda: loop.global_step > found.global_step + 3)


async def test_a_rollback_while_the_run_is_halted_restores_it(served, mesh):
    loop, client = served
    made = (await client.create_checkpoint(CreateCheckpointRequest())).checkpoint
    _, kept = loop.checkpoints.kept[made.name]
    status = await client.get_status(GetStatusRequest())
    assert [each.name for each in status.checkpoints] == [made.name]
    await client.signal_emergency(sealed(mesh, status, HALT))
    done = await client.rollback(RollbackRequest(reason="test"))
    assert done.checkpoint.name == made.name
    assert torch.equal(kept["weight"], loop.model.weight)


async def test_who_watches_is_told_of_every_emergency_once_and_can_verify_it(served, mesh):
    loop, client = served
    status = await client.get_status(GetStatusRequest())
    verifier = SignalVerifier(keyring=mesh.keyring("operator"), audience="run", run_id=status.run_id)
    loop.emergencies.alarm(HALT, "before")
    stream = client.watch_emergencies(WatchEmergenciesRequest())
    assert verifier.verify((await anext(stream)).signal).signal.reason == "before"
    for number in range(3):
        loop.emergencies.lower(NOTICE, f"calm {number}")
        loop.emergencies.alarm(NOTICE, "too low to be told")
        loop.emergencies.alarm(HALT, f"alarm {number}")
    told = [verifier.verify((await anext(stream)).signal).signal.reason for _ in range(6)]
    assert told == ["calm 0", "alarm 0", "calm 1", "alarm 1", "calm 2", "alarm 2"]
    loop.emergencies.close()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_steps_are_streamed_in_order_with_the_metrics_that_are_wanted(served):
    _, client = served
    stream = client.watch_metrics(WatchMetricsRequest(every_steps=2, names=["loss", "optimizer_lr"]))
    found = [await anext(stream) for _ in range(4)]
    await stream.aclose()
    steps = [each.global_step for each in found]
    assert steps == sorted(set(steps))
    assert all(step % 2 == 0 for step in steps)
    assert all(set(each.metrics) <= {"loss", "optimizer_lr"} and "loss" in each.metrics for each in found)


async def test_another_trainer_is_refused_and_the_own_one_is_not(served, mesh):
    _, client = served
    async with TolariaClient(client._address, identity=mesh.identity("trainer", "other")) as other:
        for call in (
            other.get_status(GetStatusRequest()),
            other.create_checkpoint(CreateCheckpointRequest()),
            other.rollback(RollbackRequest(reason="test")),
            anext(other.watch_emergencies(WatchEmergenciesRequest())),
            anext(other.watch_metrics(WatchMetricsRequest())),
        ):
            with pytest.raises(PermissionDenied, match="does not train this run"):
                await call
    async with TolariaClient(client._address, identity=mesh.identity("trainer")) as own:
        status = await own.get_status(GetStatusRequest())
        assert (await own.signal_emergency(sealed(mesh, status, NOTICE, role="trainer"))).accepted


async def test_another_trainer_cannot_have_its_signal_carried_by_an_operator(served, mesh):
    loop, client = served
    status = await client.get_status(GetStatusRequest())
    answer = await client.signal_emergency(sealed(mesh, status, HALT, role="trainer"))
    assert (answer.accepted, answer.reason, loop.halt.is_engaged) == (False, "wrong_issuer", False)


async def test_a_reader_that_does_not_read_is_ended_and_costs_bounded_memory(served):
    loop, _ = served
    call = Call("/x", SpiffeId("operator", "local"))
    stream = loop.servicer.WatchEmergencies(WatchEmergenciesRequest(least_level=NOTICE), call)
    loop.emergencies.alarm(NOTICE, "first")
    await anext(stream)
    for number in range(BACKLOG + 50):
        loop.emergencies.alarm(NOTICE, str(number))
    with pytest.raises(ResourceExhausted, match="watch again"):
        async for _ in stream:
            await asyncio.sleep(0)


async def test_steps_that_are_not_read_in_time_are_left_out_oldest_first_and_counted():
    feed, found = MetricsFeed(), []
    watching = feed.watch()
    first = asyncio.ensure_future(anext(watching))
    await until(lambda: feed.is_watched)
    for step in range(KEPT_STEPS + 11):
        feed.publish(step, 0, {"loss": 1.0})
    found.append(await first)
    feed.close()
    found += [each async for each in watching]
    steps = [sample.global_step for sample, _ in found]
    assert sum(missed for _, missed in found) + len(steps) == KEPT_STEPS + 11
    assert steps == sorted(steps)
    assert steps[-1] == KEPT_STEPS + 10
    assert not feed.is_watched


async def test_where_no_safe_point_comes_nothing_is_done_then_or_later(mesh):
    loop = training_loop.TrainingLoop(mesh.identity("trainer"), mesh.keyring("trainer"))
    loop.servicer._safe_point_seconds = 0.01
    async with serving(mesh.identity("trainer"), (training_loop.TOLARIA, loop.servicer)) as server:
        async with TolariaClient(server.address, identity=mesh.identity("operator")) as client:
            with pytest.raises(FailedPrecondition, match="stands still"):
                await client.create_checkpoint(CreateCheckpointRequest())
    loop.safe_point.reach()
    assert loop.checkpoints.kept == {}


async def test_work_that_has_begun_is_waited_for_whatever_it_takes(served):
    loop, client = served
    loop.servicer._safe_point_seconds = 30.0
    release, begun, make = threading.Event(), threading.Event(), loop.checkpoints.create_checkpoint

    def slow(reason):
        begun.set()
        release.wait(30)
        return make(reason)

    loop.checkpoints.create_checkpoint = slow
    asked = asyncio.create_task(client.create_checkpoint(CreateCheckpointRequest()))
    await until(begun.is_set)
    loop.servicer._safe_point_seconds = 0.0
    release.set()
    assert (await asked).checkpoint.name


class Attached:
    """An attached session whose Tamiyo is away, and an operator."""

    def __init__(self, directory, **settings):
        self.mesh = TemporaryMesh(directory)
        self.mesh.identity("trainer")
        self.home = Home(directory)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        nowhere = "127.0.0.1:1"
        address = MeshAddress(tamiyo=nowhere, urza=nowhere, identity_dir=self.mesh.identity_dir("trainer"))
        self.session = attach(
            self.model, self.optimizer, mesh=address, environ={"ESPER_HOME": str(directory), **settings},
            run_id=f"run-{uuid.uuid4()}",
        )  # fmt: skip

    def step(self, trainer=None):
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(2, 4)).sum()
        loss.backward()
        self.optimizer.step()
        return (trainer or self.session).step(loss)

    def esper(self, *arguments):
        self.mesh.identity("operator")
        result = CliRunner().invoke(app, ["training", *arguments, "--home", str(self.home.directory)], obj={})
        return result.exit_code, result.output

    @property
    def address(self):
        return self.session.kasmina_address


@pytest.fixture
def attached(tmp_path):
    made = Attached(tmp_path)
    yield made
    made.session.close()


def test_an_operator_halts_a_session_by_the_command_and_ends_the_halt(attached):
    attached.step()
    code, output = attached.esper("signal", attached.address, "--level", "halt", "--reason", "stop")
    assert (code, "is_halted=True" in output) == (0, True), output
    assert attached.session.halted
    steps = attached.session.global_step
    assert attached.step() == []
    assert (attached.session.global_step, attached.session.reasons["halted"]) == (steps, 1)
    code, output = attached.esper("status", attached.address, "--json")
    document = json.loads(output)
    assert (document["is_halted"], document["emergency"]["reason"]) == (True, "stop")
    assert (document["run_id"], document["status"]) == (attached.session.run_id, "HEALTH_STATUS_CRITICAL")
    code, output = attached.esper("signal", attached.address, "--level", "notice", "--lower")
    assert (code, attached.session.halted) == (0, False), output
    attached.step()
    assert attached.session.global_step == steps + 1


def test_a_run_without_checkpoints_says_so(attached):
    code, output = attached.esper("checkpoint", attached.address)
    assert (code, "keeps no checkpoints" in output) == (1, True), output
    code, output = attached.esper("rollback", attached.address)
    assert (code, "keeps no checkpoints" in output) == (1, True), output


@pytest.mark.parametrize(
    ("service", "code", "found"),
    [("TolariaService", 0, True), ("KasminaService", 0, True), ("UrzaService", 1, False)],
)
def test_the_contract_of_either_service_at_the_port_of_a_trainer_can_be_tested(attached, service, code, found):
    attached.mesh.identity("operator")
    result = CliRunner().invoke(
        app, [
            "contract-test", attached.address, "--service", service, "--only", "GetStatus", "--json",
            "--home", str(attached.home.directory),
        ], obj={},
    )  # fmt: skip
    assert result.exit_code == code, result.output
    assert not found or json.loads(result.stdout)["passed"] >= 1
    assert found or "choose from esper.kasmina.v1.KasminaService" in result.output


def test_an_unknown_level_is_wrong_usage(attached):
    assert attached.esper("signal", attached.address, "--level", "doom")[0] == 2


def test_another_process_of_the_run_on_this_host_sees_the_halt(attached):
    place = place_for(attached.session.run_id, home=attached.home.directory)
    rank = SharedSignal(place, run_id=attached.session.run_id, keyring=attached.mesh.keyring("trainer"))
    rank.poll()
    attached.session.tolaria.emergencies.alarm(HALT, "stop")
    assert rank.poll().reason == "stop"
    rank.write(NOTICE, "well")
    assert not attached.session.halted
    rank.close()
    attached.session.close()
    assert not place.exists()


def test_settings_decide_who_may_halt_and_whether_others_are_told(tmp_path):
    made = Attached(tmp_path, ESPER_EMERGENCY_ALLOW_REMOTE_HALT="true", ESPER_EMERGENCY_SHARE="false")
    status = json.loads(made.esper("status", made.address, "--json")[1])
    made.session.close()
    assert (status["allows_remote_halt"], status["shared_signal_problem"]) == (True, "[emergency] share is off")
    assert status["status"] == "HEALTH_STATUS_HEALTHY"


def test_where_memory_cannot_be_shared_the_run_goes_on_and_the_status_says_why(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    made = Attached(tmp_path)
    made.step()
    status = json.loads(made.esper("status", made.address, "--json")[1])
    made.session.tolaria.emergencies.alarm(HALT, "stop")
    halted = made.session.halted
    made.session.close()
    assert "No space left" in status["shared_signal_problem"]
    assert (status["status"], halted) == ("HEALTH_STATUS_DEGRADED", True)


def test_tolaria_ends_the_steps_and_epochs_of_an_attached_session(attached):
    trainer = orchestrate(attached.session, attached.optimizer)
    for _ in range(3):
        attached.step(trainer)
    report = trainer.end_epoch()
    assert (attached.session.global_step, attached.session.epoch, report.handshake) == (3, 1, "skipped")
    assert attached.session.apply_ms >= 0
    code, output = attached.esper("status", attached.address, "--json")
    assert (code, "epoch_hook" in json.loads(output)) == (0, True), output


@pytest.mark.parametrize(("precision", "is_kept"), [("float16", True), ("bfloat16", False)])
def test_the_scale_of_gradients_goes_back_with_the_run(attached, precision, is_kept):
    step = TrainStep(
        attached.model, attached.optimizer, lambda model, x: model(x).square().mean(),
        config=TrainStepConfig(precision=precision),
    )  # fmt: skip
    trainer = orchestrate(attached.session, attached.optimizer, train_step=step)
    trainer.train(torch.ones(2, 4))
    checkpoints, before = attached.session.checkpoints, step.scaler.get_scale()
    assert checkpoints.snapshot(epoch=0, step=1) is not None
    trainer.train(torch.full((2, 4), float("inf")))
    assert (step.scaler.get_scale() < before) is is_kept
    assert checkpoints.roll_back(latest_step=1, reason="test").succeeded
    assert step.scaler.get_scale() == before


def test_an_operator_looks_at_parameters_and_empties_caches(attached):
    code, output = attached.esper("validate", attached.address, "--seed", "seed-0", "--json")
    assert (code, json.loads(output)) == (0, []), output
    name = next(name for name, _ in attached.model.named_parameters())
    code, output = attached.esper("validate", attached.address, "--seed", "seed-0", "--parameter", name, "--json")
    assert (code, json.loads(output)) == (1, [{"parameter": name, "owner": "host"}]), output
    asked = concurrent.futures.ThreadPoolExecutor(1).submit(attached.esper, "cleanup", attached.address, "--json")
    while not asked.done():
        attached.step()
    code, output = asked.result()
    assert (code, json.loads(output)) == (0, {"freed": 0}), output


def test_the_metrics_of_an_attached_session_are_streamed(attached):
    identity = attached.mesh.identity("operator")
    with BlockingTolariaClient(attached.address, identity=identity) as client:
        stream = client.watch_metrics(WatchMetricsRequest())
        found = []
        thread = threading.Thread(target=lambda: found.append(next(stream)))
        thread.start()
        while not found:
            attached.step()
        thread.join()
        stream.close()
    assert "hook_latency_ms" in found[0].metrics


def test_without_a_mesh_a_session_does_nothing():
    session = DetachedSession(nn.Linear(1, 1))
    assert (session.step(1.0), session.end_epoch(), session.hold(), session.halted) == ([], None, True, False)


@pytest.fixture
def decided(tmp_path):
    """An attached session whose Tamiyo answers, and what it was asked at the end of epochs."""
    with fake_mesh(tmp_path) as fake:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, optimizer, mesh=find_mesh(fake.environ), environ={"ESPER_HOME": str(tmp_path)}) as session:
            yield model, orchestrate(session, optimizer), session, fake.tamiyo


def train_until_connected(model, trainer, session):
    while not session.is_connected:
        trainer.step(model(torch.ones(2, 4)).sum())


def test_the_controller_is_asked_at_the_end_of_an_epoch_and_its_answer_taken_in_time(decided):
    model, trainer, session, tamiyo = decided
    trainer.guard.config = EpochGuardConfig(budget_ms=60_000, handshake_ms=60_000)
    pause = AdaptationCommand(version=1, command_type=CommandType.COMMAND_TYPE_PAUSE, execution_deadline_ms=1)
    train_until_connected(model, trainer, session)
    tamiyo.decide = lambda step: pause if step.packet.training_metrics["accuracy"] == 0.75 else None
    report = trainer.end_epoch(accuracy=0.75)
    assert (report.handshake, report.answer.HasField("command")) == ("answered", True)
    tamiyo.decide = lambda _step: None
    outcomes = trainer.step(model(torch.ones(2, 4)).sum())
    assert [outcome.result for outcome in outcomes] == [CommandOutcome.RESULT_APPLIED]
    assert session.epoch == 1


def test_an_epoch_is_asked_about_on_the_channel_of_the_steps_also_when_that_is_left(decided, monkeypatch):
    model, trainer, session, tamiyo = decided
    trainer.guard.config = EpochGuardConfig(budget_ms=60_000, handshake_ms=60_000)
    train_until_connected(model, trainer, session)
    opened, arrived, answer = [], threading.Event(), threading.Event()
    open_channel = connection.open_channel
    monkeypatch.setattr(connection, "open_channel", lambda *a, **k: opened.append(a) or open_channel(*a, **k))
    monkeypatch.setattr(mesh_client, "open_channel", lambda *a, **k: opened.append(a) or open_channel(*a, **k))

    async def before_answer(_step):
        arrived.set()
        await until(answer.is_set)

    tamiyo.before_answer = before_answer
    asked = session.ask_epoch(session.describe_epoch(1.0), timeout=30)
    assert arrived.wait(30)
    assert opened == []
    streams = session.streams_opened
    tamiyo.before_answer = None
    session.open_again()
    while session.streams_opened == streams:
        time.sleep(0.001)
    answer.set()
    assert asked.result(30).sequence
    assert len(opened) == 1


def test_a_controller_that_is_slow_at_the_end_of_an_epoch_is_not_waited_for(decided):
    model, trainer, session, tamiyo = decided
    trainer.guard.config = EpochGuardConfig(handshake_ms=0)
    train_until_connected(model, trainer, session)
    answer = asyncio.Event()
    tamiyo.before_answer = lambda _step: answer.wait()
    assert trainer.end_epoch().handshake == "late"
    tamiyo.before_answer = None
    assert session.epoch == 1


@pytest.fixture
def checkpointed(tmp_path):
    made = Attached(tmp_path, ESPER_CHECKPOINTS_SAVE_EVERY_STEPS="1000000")
    yield made
    made.session.close()


def weights_of(loop):
    return [each.detach().clone() for each in loop.model.parameters()]


def beside(loop, *arguments):
    """Run a command while the loop goes on; returns what came of it, and the weights after each step."""
    done = concurrent.futures.ThreadPoolExecutor(1).submit(loop.esper, *arguments)
    weights = []
    while not done.done():
        loop.step()
        weights.append(weights_of(loop))
    return *done.result(), weights


def test_an_operator_writes_a_checkpoint_of_a_session_and_has_it_returned_to(checkpointed):
    code, output, before = beside(checkpointed, "checkpoint", checkpointed.address, "--json")
    assert code == 0, output
    made = json.loads(output)
    made, taken_at = made.get("checkpoint", made), checkpointed.session.global_step
    checkpointed.step()
    before.append(weights_of(checkpointed))
    code, output, after = beside(checkpointed, "rollback", checkpointed.address, "--json")
    assert code == 0, output
    restored = before[int(made["global_step"]) - 1]
    assert int(made["size_bytes"]) > 0
    assert int(made["global_step"]) <= taken_at
    assert any(all(torch.equal(a, b) for a, b in zip(step, restored, strict=True)) for step in after)
    status = json.loads(checkpointed.esper("status", checkpointed.address, "--json")[1])
    assert [each["name"] for each in status["checkpoints"]] == [made["name"]]
