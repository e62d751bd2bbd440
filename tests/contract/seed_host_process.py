"""A seed host of three seeds, the second blending and the others dormant, and a training loop; here or in a process of their own."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from pathlib import Path

import torch
from torch import nn, optim

from esper_rpc.envelope import Keyring, sign
from esper_rpc.envelope.verification import COMMAND_TYPE
from esper_rpc.identity import Identity
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, SeedOperation
from esper_rpc.proto.urza.v1 import Blueprint
from esper_rpc.server import MeshServer, ServerConfig, announce
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernels.library import Kernel, KernelLibrary
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.trainer import wrap_sites
from esper_servers.trainer.routing import breakers_of, route_commands

sys.path.insert(0, str(Path(__file__).parent))
from training_loop import TOLARIA, TrainingLoop  # Beside this file, which is run as a program too.

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
BLENDING_SEED = "seed-2"


def make_host(identity, keyring, operator):
    """`keyring` is the host's own, `operator` that of who orders the seeds about."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    factories = load_factories()
    library = KernelLibrary(None, lambda work: work.close())
    factory = factories["residual_mlp"]
    library.add(Kernel(Blueprint(descriptor=factory.descriptor(), manifest=factory.manifest())))
    host = InProcessSeedHost(
        model=model, sites=wrap_sites(model, ["0", "2", "3"]), keyring=keyring, audience=str(identity.spiffe_id),
        library=library, factories=factories,
        learning_rate=OptimizerAuthority(optim.SGD(model.parameters(), lr=0.1)),
    )  # fmt: skip
    model(torch.ones(2, 4))
    grow(host, operator, model)
    return host


def grow(host, operator, model):
    order(host, operator, 1, SeedOperation.SEED_OPERATION_GERMINATE, blueprint_id="residual_mlp")
    order(host, operator, 2, SeedOperation.SEED_OPERATION_START_TRAINING)
    loss = model(torch.ones(2, 4)).square().sum()
    loss.backward()
    host.observe(loss.item(), 1)
    host.finalize_step(1)
    order(host, operator, 3, SeedOperation.SEED_OPERATION_START_GRAFTING)


def order(host, operator, sequence, operation, **fields):
    command = AdaptationCommand(
        version=1, command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_SEED,
        target_seed_id=BLENDING_SEED, seed_operation={"operation": operation, **fields},
    )  # fmt: skip
    queued = host.submit(
        sign(
            command.SerializeToString(), payload_type=COMMAND_TYPE, keyring=operator, audience=host.verifier.audience,
            issued_at_ns=time.time_ns(), nonce=command.command_id, receiver_epoch=host.receiver_epoch,
            sequence=sequence,
        )
    )  # fmt: skip
    assert queued.result == CommandOutcome.RESULT_QUEUED, queued
    (outcome,) = host.apply_pending()
    assert outcome.result == CommandOutcome.RESULT_APPLIED, outcome


async def serve(identity_dir):
    identity = Identity.load(identity_dir)
    keyrings = [
        Keyring.load(identity_dir.with_name(name) / "keyring.json") for name in (identity_dir.name, "operator-local")
    ]
    host = make_host(identity, *keyrings)
    server = MeshServer(config=ServerConfig(drain_seconds=0.2), identity=identity)
    server.add_service(KASMINA, KasminaServicer(host, "run"))
    with TrainingLoop(identity, keyrings[0]) as loop:
        route_commands(host, loop.emergencies, breakers_of(host, loop.trainer.guard))
        server.add_service(TOLARIA, loop.servicer)
        announce("kasmina", await server.start())
        await server.run_until_signal()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
