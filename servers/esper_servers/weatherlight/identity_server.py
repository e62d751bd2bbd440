from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from esper_client.renewal import CHECK_SECONDS
from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError
from esper_rpc.identity import Authority, Identity
from esper_rpc.identity.authority import utc_now
from esper_rpc.identity.enrolment import EnrolmentTokens
from esper_rpc.identity.service import IdentityServicer
from esper_rpc.proto.identity.v1 import identity_service_pb2
from esper_rpc.server import MeshServer, ServerConfig

SERVICE = identity_service_pb2.DESCRIPTOR.services_by_name["IdentityService"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PkiConfig:
    """How certificates are issued to members of the mesh."""

    leaf_seconds: Annotated[float, Range(2, 30 * 86_400)] = 86_400.0
    """The life of a leaf; it is renewed after two thirds of it."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityServerConfig:
    """Where the authority lies and where it is served."""

    identity_dir: Path
    pki_dir: Path
    tokens_dir: Path
    address: str = "127.0.0.1:0"
    enrolment_address: str = "127.0.0.1:0"
    """A port of its own, which asks for no client certificate and serves Enroll alone."""
    deny_list: Path | None = None
    audit_log: Path | None = None
    pki: PkiConfig = PkiConfig()


class IdentityServer:
    """Serves RenewCertificate to members and Enroll to newcomers, and issues its own leaf again in time."""

    def __init__(self, config: IdentityServerConfig) -> None:
        self._config = config
        self._authority = Authority.load(config.pki_dir)
        self._stamp = _stamp_of(config.pki_dir)
        self._lifetime = lifetime = timedelta(seconds=config.pki.leaf_seconds)
        self._identity = identity = Identity.load(config.identity_dir)
        self._renewing: asyncio.Task[None] | None = None
        members = ServerConfig(address=config.address, deny_list=config.deny_list, audit_log=config.audit_log)
        self.members = MeshServer(config=members, identity=identity)
        self.members.add_service(SERVICE, IdentityServicer(self._current_authority, leaf_lifetime=lifetime))
        newcomers = ServerConfig(address=config.enrolment_address)
        self.newcomers = MeshServer(config=newcomers, identity=identity, admits_strangers=True)
        tokens = EnrolmentTokens(config.tokens_dir)
        self.newcomers.add_service(SERVICE, IdentityServicer(self._current_authority, tokens, lifetime))

    async def start(self) -> None:
        """Bind and serve both ports."""
        await self.members.start()
        await self.newcomers.start()
        self._renewing = asyncio.create_task(self._renew_itself())

    async def drain(self) -> None:
        """Finish what is in flight and end."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self.members.drain()
        await self.newcomers.drain()

    async def _renew_itself(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if utc_now() >= self._identity.renewal_due:
                # On a full disk the old leaf serves on, and the next second tries again.
                with contextlib.suppress(ConfigError, OSError):
                    leaf = self._current_authority().issue(self._identity.spiffe_id, lifetime=self._lifetime)
                    self._identity = Identity.of(leaf).save(self._config.identity_dir)

    def _current_authority(self) -> Authority:
        """A renewed intermediate is taken up without a restart; a half-written one is not."""
        stamp = _stamp_of(self._config.pki_dir)
        if stamp != self._stamp:
            try:
                self._authority, self._stamp = Authority.load(self._config.pki_dir), stamp
            except (ConfigError, ValueError):
                return self._authority
        return self._authority


def _stamp_of(pki_dir: Path) -> int:
    return (pki_dir / "intermediate.pem").stat().st_mtime_ns
