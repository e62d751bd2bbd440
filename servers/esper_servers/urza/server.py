from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esper_rpc.identity import Identity
from esper_rpc.proto.urza.v1 import urza_service_pb2
from esper_rpc.server import MeshServer, ServerConfig, announce

from .library import BlueprintLibrary
from .service import UrzaServicer

SERVICE = urza_service_pb2.DESCRIPTOR.services_by_name["UrzaService"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UrzaServerConfig:
    """What the process needs."""

    identity_dir: Path
    state_dir: Path
    address: str = "127.0.0.1:0"


async def serve(config: UrzaServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError before anything listens."""
    library = BlueprintLibrary(config.state_dir)
    identity = Identity.load(config.identity_dir)
    server = MeshServer(config=ServerConfig(address=config.address), identity=identity)
    server.add_service(SERVICE, UrzaServicer(library))
    announce("urza", await server.start())
    await server.run_until_signal()
    library.close()
