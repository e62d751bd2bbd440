"""A loop whose model lives in another process: that process slow, hung, dead, restarted, or another trainer's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid

import pytest
import torch
from torch import nn

from esper_client import LoopThread, RemoteHostConfig, RemoteSeedHost, SessionConfig, TrainingSession
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import TAMIYO, FakeTamiyo, serving
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.trainer import wrap_sites

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
SEED = "seed-0"
SECONDS = 30
MODEL_PROCESS = """
import sys
from pathlib import Path
from torch import nn, ones, optim
from esper_client import MeshAddress
from esper_servers.trainer import serve

model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
mesh = MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=Path(sys.argv[1]))
with serve(model, optim.SGD(model.parameters(), lr=0.1), mesh=mesh, sites=["0"]) as served:
    model(ones(2, 4))
    print("serving", served.address, flush=True)
    sys.stdin.read()
"""


def make_host(mesh):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    library = KernelLibrary(None, lambda work: work.close())
    factory = load_factories()["residual_mlp"]
    library.add(Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest())))
    host = InProcessSeedHost(
        model=model, sites=wrap_sites(model, ["0"]), keyring=mesh.keyring("trainer"),
        audience=str(mesh.identity("trainer").spiffe_id), library=library, factories=load_factories(),
        learning_rate=OptimizerAuthority(torch.optim.SGD(model.parameters(), lr=0.1)),
    )  # fmt: skip
    model(torch.ones(2, 4))
    return host


class GatedServicer(KasminaServicer):
    """Does what is asked, and answers once `gate` is set."""

    def __init__(self, host):
        super().__init__(host, "run")
        self.gate = asyncio.Event()
        self.gate.set()

    async def ApplyCommand(self, request, call):
        response = await super().ApplyCommand(request, call)
        await self.gate.wait()
        return response

    async def FinalizeStep(self, request, call):
        response = await super().FinalizeStep(request, call)
        await self.gate.wait()
        return response


class Server:
    """One service on a thread of its own, which can be stopped and started at the same port."""

    def __init__(self, identity, descriptor, servicer, raw_methods=frozenset()):
        self.identity, self.raw_methods, self.address = identity, raw_methods, "127.0.0.1:0"
        self.thread = LoopThread("server")
        self.start(descriptor, servicer)

    def start(self, descriptor, servicer):
        started = threading.Event()

        async def run():
            self.stopped = asyncio.Event()
            async with serving(
                self.identity, (descriptor, servicer), raw_methods=self.raw_methods, address=self.address
            ) as server:
                self.address = server.address
                started.set()
                await self.stopped.wait()

        self.running = asyncio.run_coroutine_threadsafe(run(), self.thread.loop)
        assert started.wait(SECONDS)

    def call(self, work):
        self.thread.loop.call_soon_threadsafe(work)

    def stop(self):
        self.call(self.stopped.set)
        self.running.result(SECONDS)

    def close(self):
        if not self.running.done():
            self.stop()
        self.thread.stop()


@pytest.fixture
def inner(mesh):
    return make_host(mesh)


@pytest.fixture
def servicer(inner):
    return GatedServicer(inner)


@pytest.fixture
def kasmina(mesh, servicer):
    server = Server(mesh.identity("trainer"), KASMINA, servicer)
    yield server
    server.close()


@pytest.fixture
def fake(mesh):
    return FakeTamiyo(mesh.keyring("tamiyo"))


@pytest.fixture
def tamiyo(mesh, fake):
    server = Server(mesh.identity("tamiyo"), TAMIYO, fake, FakeTamiyo.RAW_METHODS)
    yield server
    server.close()


@pytest.fixture
def connect(mesh):
    opened = []

    def open_host(address, instance="local", timeout_ms=1000):
        opened.append(
            RemoteSeedHost(
                address,
                identity=mesh.identity("trainer", instance),
                config=RemoteHostConfig(call_timeout_ms=timeout_ms),
            )
        )
        return opened[-1]

    yield open_host
    for host in opened:
        host.close()


@pytest.fixture
def open_session(mesh, tamiyo, connect):
    opened = []

    def open_it(address, instance="local"):
        opened.append(
            TrainingSession(
                host=connect(address, instance), identity=mesh.identity("trainer", instance),
                tamiyo_address=tamiyo.address, run_id="run", config=SessionConfig(step_budget_ms=200),
            )
        )  # fmt: skip
        return opened[-1]

    yield open_it
    for session in opened:
        session.close()


def step_until(session, condition):
    """Step until it is so; returns all outcomes on the way."""
    outcomes, deadline = [], time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not reached: {session.reasons} {session.host.reasons}"
        outcomes += session.step(0.5)
        time.sleep(0.001)
    return outcomes


def order(operation):
    command = AdaptationCommand(
        command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_SEED, target_seed_id=SEED
    )
    command.seed_operation.operation = SeedOperation.Value(f"SEED_OPERATION_{operation}")
    command.seed_operation.blueprint_id = "residual_mlp"
    return command


def germinate_when_dormant(step):
    seeds = step.packet.seed_states
    return order("GERMINATE") if seeds and seeds[0].stage == lifecycle.DORMANT else None


def pause(_step):
    return AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_PAUSE)


def results(outcomes, kind):
    return [outcome for outcome in outcomes if outcome.result == kind]


def test_a_session_steers_a_model_behind_a_server(open_session, kasmina, fake, inner):
    fake.decide = germinate_when_dormant
    session = open_session(kasmina.address)
    outcomes = step_until(session, lambda: results(session.outcomes, CommandOutcome.RESULT_APPLIED))
    (queued,) = results(outcomes, CommandOutcome.RESULT_QUEUED)
    (applied,) = results(outcomes, CommandOutcome.RESULT_APPLIED)
    assert applied.command_id == queued.command_id
    assert inner.seeds[SEED].stage == lifecycle.GERMINATED
    run = fake.runs["run"]
    assert (run.sites[0].site_id, run.seeds[0].seed_id) == ("0", SEED)
    assert run.receiver_epoch == inner.receiver_epoch
    assert run.host_topology == inner.describe().host_topology
    step_until(session, lambda: fake.steps[-1].packet.seed_states[0].stage == lifecycle.GERMINATED)
    assert not session.host.reasons


def test_the_loop_goes_on_when_the_model_dies_and_takes_it_up_when_it_is_back(mesh, open_session, kasmina, fake, inner):
    session = open_session(kasmina.address)
    step_until(session, lambda: session.reasons["nominal"] > 3)
    kasmina.stop()
    step_until(session, lambda: session.host.reasons["host_breaker_open"] > 10)
    assert session.host.export_seed_states() == []
    assert session.reasons["internal_error"] == 0
    again = make_host(mesh)
    kasmina.start(KASMINA, KasminaServicer(again, "run"))
    fake.decide = germinate_when_dormant
    step_until(session, lambda: again.seeds[SEED].stage == lifecycle.GERMINATED)
    assert fake.runs["run"].receiver_epoch == again.receiver_epoch
    # A command may still be addressed to the host that died, until the session hears the new challenge.
    assert set(again.verifier.rejections) <= {"wrong_epoch"}
    assert inner.seeds[SEED].stage == lifecycle.DORMANT


def test_a_hung_host_costs_its_timeout_a_few_times_and_then_nothing(connect, kasmina, servicer):
    host = connect(kasmina.address, timeout_ms=50)
    host.describe()
    kasmina.call(servicer.gate.clear)
    misses = host.config.breaker.failures
    begun = time.monotonic()
    for step in range(misses):
        assert host.finalize_step(step) == []
    assert time.monotonic() - begun < SECONDS
    assert (host.reasons["host_deadline_missed"], host.reasons["host_breaker_open"]) == (misses, 0)
    assert host.finalize_step(misses) == []
    assert host.reasons["host_breaker_open"] == 1
    kasmina.call(servicer.gate.set)


def test_a_command_whose_answer_was_lost_is_carried_out_once_and_told_later(mesh, connect, kasmina, servicer, inner):
    host = connect(kasmina.address)
    host.describe()
    fake = FakeTamiyo(mesh.keyring("tamiyo"))
    envelope = fake.sign(order("GERMINATE"), inner.verifier.audience, 1, host.receiver_epoch, b"", "run")
    kasmina.call(servicer.gate.clear)
    lost = host.submit(envelope)
    assert (lost.result, lost.reason) == (CommandOutcome.RESULT_FAILED, "host_deadline_missed")
    kasmina.call(servicer.gate.set)
    host.finalize_step(1)
    (outcome,) = host.apply_pending()
    assert (outcome.command_id, outcome.result) == (envelope.nonce, CommandOutcome.RESULT_APPLIED)
    host.finalize_step(2)
    assert host.apply_pending() == []


def test_a_command_that_never_arrived_is_forgotten_when_the_host_answers(mesh, connect, kasmina, servicer, inner):
    host = connect(kasmina.address)
    host.describe()
    kasmina.stop()
    fake = FakeTamiyo(mesh.keyring("tamiyo"))
    outcome = host.submit(fake.sign(order("GERMINATE"), inner.verifier.audience, 1, host.receiver_epoch, b"", "run"))
    assert (outcome.result, outcome.reason) == (CommandOutcome.RESULT_FAILED, "host_unreachable")
    kasmina.start(KASMINA, servicer)
    deadline = time.monotonic() + SECONDS
    while not host.finalize_step(1):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert (host.apply_pending(), list(host._awaited)) == ([], [])
    assert inner.seeds[SEED].stage == lifecycle.DORMANT


def test_a_host_that_never_was_costs_no_exception(connect):
    host = connect("127.0.0.1:1")
    assert host.describe().seeds == ()
    assert (host.receiver_epoch, host.last_sequence) == (b"", 0)
    host.observe(0.5, 1)
    host.update_epoch(1)
    host.advance_alphas()
    assert host.finalize_step(1) == host.apply_pending() == host.export_seed_states() == []
    host.close()
    assert host.finalize_step(2) == []
    assert set(host.reasons) == {"host_unreachable"}


def test_a_second_session_numbers_on_from_what_the_host_has_accepted(open_session, kasmina, fake, inner):
    fake.decide = pause
    first = open_session(kasmina.address)
    step_until(first, lambda: inner.last_sequence > 2)
    first.close()
    accepted = inner.last_sequence
    second = open_session(kasmina.address)
    step_until(second, lambda: inner.last_sequence > accepted)
    assert "sequence_replayed" not in inner.verifier.rejections


def test_another_trainer_can_neither_command_nor_drive_the_model(open_session, kasmina, fake, inner):
    fake.decide = germinate_when_dormant
    session = open_session(kasmina.address, instance="another")
    outcomes = step_until(session, lambda: session.outcomes)
    assert {outcome.reason for outcome in outcomes} == {"wrong_audience"}
    step_until(session, lambda: session.host.reasons["host_refused"] > 3)
    assert session.host.reasons["host_wrong_audience"] > 0
    assert (inner.global_step, inner.seeds[SEED].stage) == (0, lifecycle.DORMANT)


def test_the_loop_survives_the_kill_of_the_process_of_its_model(mesh, open_session):
    directory = mesh.identity_dir("trainer")
    mesh.identity("trainer")
    process = subprocess.Popen(
        [sys.executable, "-c", MODEL_PROCESS, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        # Warnings of the mesh that is not there may come first.
        session = open_session(next(line.split()[1] for line in process.stdout if line.startswith("serving ")))
        step_until(session, lambda: session.reasons["nominal"] > 3)
        assert session.host.export_seed_states()[0].seed_id == SEED
        process.kill()
        process.wait(SECONDS)
        step_until(session, lambda: session.host.reasons["host_unreachable"] > 0)
        nominal = session.reasons["nominal"]
        step_until(session, lambda: session.reasons["nominal"] > nominal + 3)
        assert session.reasons["internal_error"] == 0
    finally:
        process.kill()
        process.communicate()
