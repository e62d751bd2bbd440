from __future__ import annotations

from typing import Any

import grpc

from esper_rpc.errors import EsperError, InvalidRequest, Unauthenticated
from esper_rpc.identity import SpiffeId
from esper_rpc.status import abort

from .handlers import guarded

TLS_VERSION = b"TLSv1.3"


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> SpiffeId:
    """Read who calls from the connection's certificate; raises Unauthenticated."""
    facts = {key: list(values) for key, values in context.auth_context().items()}
    if facts.get("ssl_tls_version", [b""])[0] != TLS_VERSION:
        raise Unauthenticated("This mesh speaks TLS 1.3 only.")
    names = facts.get("peer_spiffe_id", [])
    if len(names) != 1:
        raise Unauthenticated(f"A peer's certificate must hold exactly one SPIFFE id, this one holds {len(names)}.")
    try:
        return SpiffeId.parse(names[0].decode())
    except InvalidRequest as error:
        raise Unauthenticated(error.message) from error


class IdentityInterceptor(grpc.aio.ServerInterceptor):
    """Refuses a call whose peer has no identity of this mesh."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Check the peer before the method runs."""
        return guarded(await continuation(handler_call_details), self._check)

    async def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            peer_of(context)
        except EsperError as error:
            await abort(context, error)
