from __future__ import annotations

import asyncio
import contextlib
import gc

import torch

from esper_client.client import UrzaClient
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.identity import Identity
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.server import MeshServer, announce
from esper_servers.policy import sample
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import LEGAL_OPERATIONS
from esper_servers.policy.policy import Policy
from esper_servers.policy.prior import RunSignals

from .controller import Controller, TamiyoServerConfig
from .service import RAW_METHODS

SERVICE = tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]
WARM_UP_STEPS = 20


async def serve(config: TamiyoServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError before anything listens."""
    identity = Identity.load(config.identity_dir)
    controller = Controller(config)
    server = MeshServer(config=config.server, identity=identity)
    server.add_service(SERVICE, controller.servicer, raw_methods=RAW_METHODS)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(controller.close)
        if config.urza_address:
            urza = await stack.enter_async_context(UrzaClient(config.urza_address, identity=identity))
            await controller.blueprints.refresh(urza)
            refresher = asyncio.create_task(controller.blueprints.keep_fresh(urza))
            stack.callback(refresher.cancel)
        prepare(controller.resume())
        announce("tamiyo", await server.start())
        server.every(CHECK_SECONDS, CertificateRenewer(identity, address=config.weatherlight_address).check)
        server.every(CHECK_SECONDS, config.keyring.refresh)
        controller.work_beside(server)
        building = asyncio.create_task(controller.plans.build())
        stack.callback(building.cancel)
        await server.run_until_signal()


def prepare(policy: Policy) -> None:
    """Make the process fit for steps: one thread, warm caches, long-lived objects out of the collector."""
    # Two torch threads are twice as slow as one on graphs of this size.
    torch.set_num_threads(1)
    graph = RunGraph(sample.sample_topology(), sample.sample_sites(), sample.sample_seeds(), [])
    states = sample.sample_states(next(iter(LEGAL_OPERATIONS)))  # type: ignore[arg-type]  # A stage by number.
    signals = RunSignals(
        steps=0, steps_since_germination=0, loss_trend=0.0, loss_volatility=0.0, steps_since_optimizer=0
    )
    for _ in range(WARM_UP_STEPS):
        policy.evaluate(graph.fill(SystemStatePacket(seed_states=states)), states, signals)
    gc.collect()
    gc.freeze()
