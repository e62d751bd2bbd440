from __future__ import annotations

from collections.abc import Mapping

from esper_client.event_loop import LoopThread
from esper_rpc.config import load
from esper_servers.weatherlight.identity_server import IdentityServer, IdentityServerConfig, PkiConfig

from .home import Home


class AuthorityThread:
    """Serves the authority of a home from a thread of the process that supervises the mesh."""

    def __init__(self, home: Home, environ: Mapping[str, str], *, address: str, enrolment_address: str) -> None:
        self._config = IdentityServerConfig(
            identity_dir=home.identity_dir("weatherlight"),
            pki_dir=home.pki,
            tokens_dir=home.tokens_dir,
            address=address,
            enrolment_address=enrolment_address,
            deny_list=home.deny_list,
            audit_log=home.audit_log("weatherlight"),
            pki=load(PkiConfig, "pki", path=home.settings_file, environ=environ),
        )
        self._thread: LoopThread | None = None
        self._server: IdentityServer | None = None
        self.addresses: dict[str, str] = {}

    def start(self) -> None:
        """Serve; raises ConfigError when a port is taken or a file is wrong."""
        self._thread = LoopThread("authority")
        self._server = self._thread.run(self._serve())
        self.addresses = {
            "weatherlight": self._server.members.address,
            "enrolment": self._server.newcomers.address,
        }

    def stop(self) -> None:
        """Finish what is in flight and end."""
        if self._thread is not None and self._server is not None:
            self._thread.run(self._server.drain())
            self._thread.stop()
        self._thread = self._server = None

    async def _serve(self) -> IdentityServer:
        # Made on the loop that serves it.
        server = IdentityServer(self._config)
        await server.start()
        return server
