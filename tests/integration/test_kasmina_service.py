from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import uuid

import pytest
import torch
from torch import nn

from esper_client import KasminaClient, MeshAddress, attach
from esper_rpc.envelope import sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.errors import FailedPrecondition, NotFound, Unavailable
from esper_rpc.proto.kasmina.v1 import (
    AdvanceAlphaRequest,
    ApplyCommandRequest,
    FinalizeStepRequest,
    GateResult,
    UpdateEpochRequest,
    WatchSeedEventsRequest,
    kasmina_service_pb2,
)
from esper_rpc.proto.kasmina.v1 import GetStatusRequest as KasminaStatusRequest
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedLifecycleGate, SeedOperation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.testing import TemporaryMesh, serving
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.trainer import wrap_sites

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
SEED = "seed-0"


def make_host(mesh, **options):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    factories = load_factories()
    library = KernelLibrary(lambda _: None, lambda work: work.close())
    factory = factories["residual_mlp"]
    library.add(Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest())))
    host = InProcessSeedHost(
        model=model, sites=wrap_sites(model, ["0"]), keyring=mesh.keyring("trainer"),
        audience=str(mesh.identity("trainer").spiffe_id), library=library, factories=factories,
        learning_rate=OptimizerAuthority(torch.optim.SGD(model.parameters(), lr=0.1)), **options,
    )  # fmt: skip
    model(torch.ones(2, 4))
    return host


def germinate(mesh, status):
    command = AdaptationCommand(
        version=1, command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_SEED, target_seed_id=SEED
    )
    command.seed_operation.operation = SeedOperation.SEED_OPERATION_GERMINATE
    command.seed_operation.blueprint_id = "residual_mlp"
    envelope = sign(
        command.SerializeToString(), payload_type=COMMAND_TYPE, keyring=mesh.keyring("operator"),
        audience=status.audience, issued_at_ns=time.time_ns(), nonce=command.command_id,
        receiver_epoch=status.receiver_epoch, sequence=len(status.fences) + 1,
    )  # fmt: skip
    return ApplyCommandRequest(command=envelope)


@contextlib.asynccontextmanager
async def operated(mesh, host):
    async with serving(mesh.identity("trainer"), (KASMINA, KasminaServicer(host, "run"))) as server:
        client = KasminaClient(server.address, identity=mesh.identity("operator"))
        async with client:
            yield client


async def test_an_operator_signs_from_the_status_and_sees_what_happens(tmp_path):
    mesh = TemporaryMesh(tmp_path)
    host = make_host(mesh)
    async with operated(mesh, host) as client:
        events = client.watch_seed_events(WatchSeedEventsRequest())
        assert (await anext(events)).event.to_stage == lifecycle.DORMANT
        request = germinate(mesh, await client.get_status(KasminaStatusRequest()))
        first, again = await client.apply_command(request), await client.apply_command(request)
        assert first.outcome.result == CommandOutcome.RESULT_QUEUED
        assert (first.duplicate, again.duplicate) == (False, True)
        host.apply_pending()
        asked, moved, settled = [(await anext(events)).event for _ in range(3)]
        assert (asked.gate.gate, asked.gate.result) == (
            SeedLifecycleGate.SEED_LIFECYCLE_GATE_G0_SANITY, GateResult.GATE_RESULT_PASSED,
        )  # fmt: skip
        assert (moved.from_stage, moved.to_stage) == (lifecycle.DORMANT, lifecycle.GERMINATED)
        assert settled.outcome.result == CommandOutcome.RESULT_APPLIED
        status = await client.get_status(KasminaStatusRequest())
        assert [f.sequence for f in status.fences] == [1]
        assert status.seeds[0].stage == lifecycle.GERMINATED
        host.close()
        assert [event async for event in events] == []


async def test_alpha_and_steps_are_driven_by_a_loop_elsewhere(tmp_path):
    mesh = TemporaryMesh(tmp_path)
    async with operated(mesh, make_host(mesh)) as client:
        with pytest.raises(NotFound):
            await client.advance_alpha(AdvanceAlphaRequest(seed_id="nobody"))
        with pytest.raises(FailedPrecondition):
            await client.advance_alpha(AdvanceAlphaRequest(seed_id=SEED))
        await client.apply_command(germinate(mesh, await client.get_status(KasminaStatusRequest())))
        packets = (await client.finalize_step(FinalizeStepRequest(step_index=7))).packets
        assert [p.packet_id for p in packets] == [f"{SEED}-7", "global-7"]
        await client.update_epoch(UpdateEpochRequest(epoch=1))
        assert (await client.get_status(KasminaStatusRequest())).seeds[0].age_epochs == 1


async def test_a_call_that_changes_the_model_waits_for_the_training_thread(tmp_path):
    mesh = TemporaryMesh(tmp_path)
    host = make_host(mesh, has_training_thread=True)
    async with operated(mesh, host) as client:
        call = asyncio.ensure_future(client.finalize_step(FinalizeStepRequest(step_index=3)))
        while not host.waiting_work:
            await asyncio.sleep(0)
        assert host.global_step == 0
        host.apply_pending()
        assert [p.packet_id for p in (await call).packets] == ["global-3"]


async def test_the_seed_host_of_a_trainer_is_served_as_long_as_its_session_lives(mesh):
    mesh.keyring("trainer")
    address = MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=mesh.identity_dir("trainer"))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=address, run_id="held")
    try:
        gc.collect()  # gRPC ends a server that nothing refers to.
        async with KasminaClient(session.kasmina_address, identity=mesh.identity("operator")) as client:
            assert (await client.get_status(KasminaStatusRequest())).run_id == "held"
    finally:
        await asyncio.to_thread(session.close)
    async with KasminaClient(session.kasmina_address, identity=mesh.identity("operator")) as client:
        with pytest.raises(Unavailable):
            await client.get_status(KasminaStatusRequest())
