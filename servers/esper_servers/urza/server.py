from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
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
    server: ServerConfig = field(default_factory=ServerConfig)
    weatherlight_address: str | None = None
    """Who renews the certificate."""


async def serve(config: UrzaServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError before anything listens."""
    library = BlueprintLibrary(config.state_dir)
    identity = Identity.load(config.identity_dir)
    server = MeshServer(config=config.server, identity=identity)
    server.add_service(SERVICE, UrzaServicer(library))
    announce("urza", await server.start())
    server.every(CHECK_SECONDS, CertificateRenewer(identity, address=config.weatherlight_address).check)
    await server.run_until_signal()
    library.close()
