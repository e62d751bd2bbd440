from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import nn

from esper_client.discovery import MeshAddress, find_mesh
from esper_client.event_loop import LoopThread
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_rpc.errors import ConfigError
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.tolaria.v1 import tolaria_service_pb2
from esper_rpc.server import MeshServer, ServerConfig
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.tolaria.service import TolariaServicer

from .arguments import check_arguments
from .membership import Membership
from .routing import route_moves
from .seed_host import make_seed_host
from .sites import undone_if_it_fails

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
TOLARIA = tolaria_service_pb2.DESCRIPTOR.services_by_name["TolariaService"]


def serve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str] = os.environ,
    mesh: MeshAddress | None = None,
    sites: Sequence[str] | None = None,
    run_id: str = "",
    limits: LocalLimits | None = None,
    address: str = "127.0.0.1:0",
) -> ServedModel:
    """Wrap sites of a model that a loop in another process drives, and serve Kasmina for its RemoteSeedHost.

    Between its own calls that loop ends a step here by RPC: nothing else may run the model meanwhile.

    Raises:
        ConfigError: When there is no mesh, or the model cannot be wrapped.
    """
    check_arguments(model, optimizer, mesh=mesh, sites=sites, run_id=run_id, limits=limits)
    found = mesh or find_mesh(environ)
    if found is None:
        raise ConfigError("No mesh found: `esper up` starts one.")
    member = Membership.read(found, environ)
    limits, thread = limits or member.limits(), LoopThread("esper-kasmina")
    authority = OptimizerAuthority(optimizer)
    with undone_if_it_fails(model, thread):
        host = make_seed_host(model, authority, member, sites, limits, thread, has_training_thread=False)
        # There are none of the trainer here, and no emergencies: its own TolariaService hears of those.
        route_moves(host, host.breakers)
        server = thread.run(serve_host(host, member, address, run_id, lambda: None), timeout=10)
    return ServedModel(host, server, thread)


class ServedModel:
    """A model that another process trains, while its KasminaService runs."""

    def __init__(self, host: InProcessSeedHost, server: MeshServer, thread: LoopThread) -> None:
        self.host = host
        self.address = server.address
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stop serving. The model stays as it is."""
        self.host.close()
        self._thread.run(self._server.drain(), timeout=self._server.config.drain_seconds + 5)
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def serve_host(
    host: InProcessSeedHost,
    member: Membership,
    address: str,
    run_id: str,
    on_renewed: Callable[[], object],
    *,
    tolaria: TolariaServicer | None = None,
) -> MeshServer:
    """Serve the seed host, and what orchestrates the run, to operators; certificates and keys are renewed meanwhile."""
    config = ServerConfig(address=address, drain_seconds=0.5, deny_list=member.mesh.deny_list)
    server = MeshServer(config=config, identity=member.identity)
    server.add_service(KASMINA, KasminaServicer(host, run_id))
    if tolaria is not None:
        server.add_service(TOLARIA, tolaria)
    await server.start()
    renewer = CertificateRenewer(
        member.identity, address=member.mesh.weatherlight, on_renewed=lambda _identity: on_renewed()
    )
    server.every(CHECK_SECONDS, renewer.check)
    server.every(CHECK_SECONDS, member.keyring.refresh)
    return server
