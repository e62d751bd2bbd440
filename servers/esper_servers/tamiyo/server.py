from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from esper_client.client import UrzaClient
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.errors import ConfigError
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import tamiyo_service_pb2
from esper_rpc.server import MeshServer, announce

from .controller import Controller
from .server_config import TamiyoServerConfig
from .step_processes.step_process import serve_steps
from .step_service import RAW_METHODS
from .warm_up import prepare

SERVICE = tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]


async def serve(config: TamiyoServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError before anything listens."""
    _require_reference()
    identity = Identity.load(config.identity_dir)
    controller = Controller(config)
    server_config = replace(config.server, shares_port=config.step_processes.count > 1)
    server = MeshServer(config=server_config, identity=identity)
    server.add_service(SERVICE, controller.servicer, raw_methods=RAW_METHODS)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(controller.close)
        if config.urza_address:
            urza = await stack.enter_async_context(UrzaClient(config.urza_address, identity=identity))
            await controller.blueprints.refresh(urza)
            refresher = asyncio.create_task(controller.blueprints.keep_fresh(urza))
            stack.callback(refresher.cancel)
        prepare(controller.resume())
        address = await server.start()
        further = replace(config, server=replace(server_config, address=address), publisher=None)
        await controller.step_processes.start(partial(serve_steps, further))
        announce("tamiyo", address)
        server.every(CHECK_SECONDS, CertificateRenewer(identity, address=config.weatherlight_address).check)
        server.every(CHECK_SECONDS, config.keyring.refresh)
        controller.work_beside(server)
        building = asyncio.create_task(controller.build_plan())
        stack.callback(building.cancel)
        await server.run_until_signal()


def _require_reference() -> None:
    """Policies are trained with PyTorch Geometric. Looked for and not imported: that takes as long as all of torch."""
    if find_spec("torch_geometric") is None:
        raise ConfigError("torch_geometric is missing; install it with: pip install 'esper-rpc[servers]'")
