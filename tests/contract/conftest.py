from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from esper_rpc.envelope import Keyring
from esper_rpc.identity import Authority
from esper_rpc.identity.enrolment import EnrolmentTokens
from esper_rpc.identity.service import IdentityServicer
from esper_rpc.journal import Journal
from esper_rpc.pause_quota import PauseConfig
from esper_rpc.server import MeshServer, ServerConfig
from esper_rpc.testing import TemporaryMesh, serving
from esper_servers.contract.methods import CLIENTS, SERVICES
from esper_servers.contract.remote import RemoteTransport
from esper_servers.contract.templates import Surroundings
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import PriorConfig
from esper_servers.tamiyo.aside import Aside
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.field_reports.config import ReportConfig
from esper_servers.tamiyo.field_reports.reports import FieldReports
from esper_servers.tamiyo.pauses.pauses import Pauses
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.plans.plan_switch import PlanConfig, PlanSwitch
from esper_servers.tamiyo.policy_updates.assembly import updates_of
from esper_servers.tamiyo.policy_updates.store import Entry, Lineage
from esper_servers.tamiyo.records.decisions import DecisionLog
from esper_servers.tamiyo.records.replay import Replay
from esper_servers.tamiyo.records.step_dumps import StepDumps
from esper_servers.tamiyo.run_state import Runs
from esper_servers.tamiyo.service import TamiyoServicer
from esper_servers.tamiyo.step_service import RAW_METHODS
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.service import UrzaServicer

IDENTITY, KASMINA, TAMIYO, TOLARIA, URZA = sorted(SERVICES)


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


seed_host_process = load_beside("seed_host_process")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    return TemporaryMesh(tmp_path_factory.mktemp("mesh"))


@pytest.fixture(scope="module")
def policy():
    return Policy.initial()


@pytest.fixture
def pipeline(mesh, policy, tmp_path):
    with make_pipeline(mesh, policy, tmp_path) as made:
        yield made


@contextlib.contextmanager
def make_pipeline(mesh, policy, directory):
    journal = Journal(directory / "journal.sqlite")
    yield StepPipeline(
        policy=policy, runs=Runs(), blueprints=BlueprintCache(), keyring=mesh.keyring("tamiyo"),
        decisions=DecisionLog(journal), mode=ConservativeMode(),
    )  # fmt: skip
    journal.close()


@contextlib.contextmanager
def make_tamiyo(pipeline):
    journal = pipeline._decisions._journal
    directory = journal._path.parent
    updates = updates_of(
        pipeline, directory=directory / "policies", journal=journal._path, keyring=pipeline._keyring,
        prior=PriorConfig(), plans=PlanSwitch(pipeline.policy, directory, PlanConfig(compile=False)), aside=Aside(),
    )  # fmt: skip
    dumps = StepDumps.of(pipeline.recorder, journal, clock_ns=pipeline.clock_ns)
    yield TamiyoServicer(
        pipeline=pipeline, blueprints=pipeline._blueprints, decisions=pipeline._decisions,
        pauses=Pauses.of(journal, PauseConfig()), updates=updates,
        replay=lambda command_id: asyncio.to_thread(
            Replay(pipeline._decisions, lambda: pipeline.policy).differences, command_id
        ),
        reports=FieldReports.of(pipeline.observations, journal, ReportConfig(), clock_ns=pipeline.clock_ns),
        dumps=dumps,
    )  # fmt: skip
    dumps.stop_listening()


@pytest.fixture
def tamiyo(pipeline):
    with make_tamiyo(pipeline) as made:
        yield made


@contextlib.contextmanager
def make_servicers(mesh, policy, directory):
    """A servicer of every service, with state of its own."""
    authority = Authority.load(mesh.directory / "pki")
    library = BlueprintLibrary(directory / "urza")
    host = seed_host_process.make_host(mesh.identity("trainer"), mesh.keyring("trainer"), mesh.keyring("operator"))
    with contextlib.ExitStack() as stack:
        pipeline = stack.enter_context(make_pipeline(mesh, policy, directory))
        tamiyo = stack.enter_context(make_tamiyo(pipeline))
        # A rollback needs a policy to return to.
        tamiyo._updates._lineage = Lineage((Entry("gnn_v1-heuristic-0"), Entry(policy.version)))
        loop = stack.enter_context(seed_host_process.TrainingLoop(mesh.identity("trainer"), mesh.keyring("trainer")))
        seed_host_process.route_commands(
            host, loop.emergencies, seed_host_process.breakers_of(host, loop.trainer.guard)
        )
        yield {
            IDENTITY: IdentityServicer(lambda: authority, EnrolmentTokens(mesh.directory / "tokens")),
            KASMINA: KasminaServicer(host, "run"),
            TAMIYO: tamiyo,
            TOLARIA: loop.servicer,
            URZA: UrzaServicer(library),
        }
    library.close()


@pytest.fixture
def servicers(mesh, policy, tmp_path):
    with make_servicers(mesh, policy, tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def serving_each(mesh, servicers):
    """Every service on a server of its own, under the certificate of its role."""
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for name, servicer in servicers.items():
            raw = RAW_METHODS if name == TAMIYO else frozenset()
            member = mesh.identity(CLIENTS[name].role)
            server = await stack.enter_async_context(serving(member, (SERVICES[name], servicer), raw_methods=raw))
            found[name] = server.address
        yield found


@contextlib.asynccontextmanager
async def admitting_strangers(mesh, servicer):
    """The port where newcomers enrol."""
    config = ServerConfig(drain_seconds=0.2)
    server = MeshServer(config=config, identity=mesh.identity("weatherlight"), admits_strangers=True)
    server.add_service(SERVICES[IDENTITY], servicer)
    await server.start()
    yield server.address
    await server.drain()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remote(mesh, policy, surroundings, tmp_path_factory):
    """A way to servers that run for as long as the tests of a file."""
    with make_servicers(mesh, policy, tmp_path_factory.mktemp("state")) as servicers:
        async with serving_each(mesh, servicers) as addresses:
            async with admitting_strangers(mesh, servicers[IDENTITY]) as enrolment:
                strangers = {IDENTITY: enrolment}
                async with RemoteTransport(addresses, surroundings.identity, strangers=strangers) as transport:
                    yield transport


@pytest.fixture
async def addresses(mesh, tamiyo):
    async with serving_each(mesh, {TAMIYO: tamiyo}) as found:
        yield {name: (address, CLIENTS[name].role) for name, address in found.items()}


@pytest.fixture(scope="module")
def surroundings(mesh):
    return Surroundings(
        identity=lambda member: mesh.identity(member.role, member.instance),
        keyring=mesh.keyring,
        token=lambda member: new_token(mesh.directory / "tokens", member),
    )


def new_token(directory, member):
    keyring = Keyring(role=member.role, active_key_id="k", issuer_keys={}, received={})
    tokens = EnrolmentTokens(directory)
    return tokens.create(member, lifetime=timedelta(minutes=5), keyring_json=keyring.to_json().decode())


@pytest.fixture(scope="session")
def make_token():
    return new_token


@pytest.fixture(scope="module")
def unique():
    numbers = itertools.count(1)
    return lambda: f"case-{next(numbers)}"
