"""The clients without asyncio, in all four shapes of an RPC, also where a loop runs already as in a notebook."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from esper_client import BlockingTamiyoClient, BlockingUrzaClient, LoopThread
from esper_rpc import errors
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, OpenRunRequest, Step
from esper_rpc.proto.urza.v1 import (
    FetchKernelRequest,
    KernelHeader,
    UploadKernelRequest,
    WatchCatalogRequest,
    urza_service_pb2,
)
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.urza.library import BlueprintLibrary
from esper_servers.urza.seeding import installed_blueprints
from esper_servers.urza.service import UrzaServicer

URZA = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]


@pytest.fixture
def urza(mesh, tmp_path):
    """Of a library of its own, served on another thread."""
    thread, library = LoopThread("urza"), BlueprintLibrary(tmp_path / "library")

    async def start():
        server = MeshServer(config=ServerConfig(drain_seconds=0.2), identity=mesh.identity("urza"))
        server.add_service(URZA, UrzaServicer(library))
        return server, await server.start()

    server, address = thread.run(start())
    with BlockingUrzaClient(address, identity=mesh.identity("operator")) as client:
        yield client
    thread.run(server.drain())
    thread.stop()
    library.close()


@pytest.fixture
def tamiyo(shared_mesh):
    address, home = shared_mesh.addresses["tamiyo"], shared_mesh.home
    with BlockingTamiyoClient(address, identity=home.identity("trainer")) as client:
        yield client


def upload_of(blueprint_id, weights):
    yield UploadKernelRequest(
        header=KernelHeader(blueprint_id=blueprint_id, size_bytes=len(weights), sha256=hashlib.sha256(weights).digest())
    )
    yield UploadKernelRequest(chunk=weights)


def test_a_kernel_goes_up_and_comes_down(urza):
    weights = bytes(range(256)) * 16
    saved = next(installed_blueprints())
    saved.blueprint.descriptor.blueprint_id = "with-weights"
    saved.blueprint.manifest.weights_sha256 = hashlib.sha256(weights).digest()
    urza.save_blueprint(saved)
    urza.upload_kernel(upload_of("with-weights", weights))
    parts = list(urza.fetch_kernel(FetchKernelRequest(blueprint_id="with-weights")))
    assert b"".join(part.chunk for part in parts) == weights


def test_a_stream_that_is_left_early_is_closed(urza):
    for request in installed_blueprints():
        urza.save_blueprint(request)
    watching = urza.watch_catalog(WatchCatalogRequest())
    assert next(watching).update.blueprint_id
    watching.close()
    with pytest.raises(StopIteration):
        next(watching)


def test_steps_are_asked_from_an_ordinary_generator(tamiyo):
    tamiyo.open_run(OpenRunRequest(run_id="blocking", protocol_versions=[2], receiver_epoch=bytes(16)))
    steps = (EvaluateStepsRequest(step=Step(run_id="blocking", sequence=n, budget_us=10**6, packet={})) for n in (1, 2))
    assert [answer.decision.sequence for answer in tamiyo.evaluate_steps(steps)] == [1, 2]


async def test_in_a_notebook_a_loop_runs_already(tamiyo):
    assert asyncio.get_running_loop().is_running()
    with pytest.raises(errors.FailedPrecondition):
        tamiyo.open_run(OpenRunRequest(run_id="notebook", protocol_versions=[99], receiver_epoch=bytes(16)))
