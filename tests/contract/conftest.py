from __future__ import annotations

import contextlib

import pytest
from torch import nn, optim

from esper_rpc.identity import Authority
from esper_rpc.identity.service import IdentityServicer
from esper_rpc.journal import Journal
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.urza.v1 import urza_service_pb2
from esper_rpc.testing import TAMIYO, serving
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernel_library import KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.policy.policy import Policy
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.decisions import DecisionLog
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.run_state import Runs
from esper_servers.tamiyo.service import RAW_METHODS, TamiyoServicer
from esper_servers.trainer import wrap_sites
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.service import UrzaServicer

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]
IDENTITY = identity_service_pb2.DESCRIPTOR.services_by_name["IdentityService"]


@pytest.fixture
def pipeline(mesh, tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    blueprints = BlueprintCache()
    yield StepPipeline(
        policy=Policy.initial(), runs=Runs(), blueprints=blueprints, keyring=mesh.keyring("tamiyo"),
        decisions=DecisionLog(journal), mode=ConservativeMode(),
    )  # fmt: skip
    journal.close()


@pytest.fixture
def tamiyo(pipeline):
    return TamiyoServicer(
        pipeline=pipeline, blueprints=pipeline._blueprints, decisions=pipeline._decisions, mode=pipeline._mode
    )


@pytest.fixture
def kasmina(mesh):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    host = InProcessSeedHost(
        model=model, sites=wrap_sites(model, ["0"]), keyring=mesh.keyring("trainer"),
        audience=str(mesh.identity("trainer").spiffe_id), library=KernelLibrary(None, lambda work: work.close()),
        factories=load_factories(), learning_rate=OptimizerAuthority(optim.SGD(model.parameters(), lr=0.1)),
    )  # fmt: skip
    return KasminaServicer(host, "run")


@pytest.fixture
def urza(tmp_path):
    library = BlueprintLibrary(tmp_path / "urza")
    yield UrzaServicer(library)
    library.close()


@pytest.fixture
def identity(mesh):
    return IdentityServicer(lambda: Authority.load(mesh.directory / "pki"))


@pytest.fixture
async def addresses(mesh, tamiyo, kasmina, urza, identity):
    """Every service on a server of its own, under the certificate of its role."""
    services = [
        ("tamiyo", TAMIYO, tamiyo), ("trainer", KASMINA, kasmina), ("urza", URZA, urza),
        ("weatherlight", IDENTITY, identity),
    ]  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for role, descriptor, servicer in services:
            raw = RAW_METHODS if descriptor is TAMIYO else frozenset()
            server = await stack.enter_async_context(
                serving(mesh.identity(role), (descriptor, servicer), raw_methods=raw)
            )
            found[descriptor.full_name] = (server.address, role)
        yield found
