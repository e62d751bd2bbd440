from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from esper_rpc.audit import AuditLog
from esper_rpc.errors import EsperError, InvalidRequest, Unauthenticated
from esper_rpc.identity.peer import CURRENT_PEER, STRANGER, Peer, PeerTrust, leaf_end
from esper_rpc.identity.spiffe import SpiffeId
from esper_rpc.status import abort

from .handlers import WrappedHandlers, responses_of, rewrapped

TLS_VERSION = b"TLSv1.3"


class IdentityInterceptor(grpc.aio.ServerInterceptor):
    """Refuses a call whose peer has no identity of this mesh, and ends streams of a peer that lost it."""

    def __init__(self, trust: PeerTrust, audit: AuditLog, *, admits_strangers: bool = False) -> None:
        self._trust = trust
        self._audit = audit
        self._admits_strangers = admits_strangers
        self._handlers = WrappedHandlers()
        self._streams: dict[asyncio.Task[Any], Peer] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Check the peer before the method runs."""
        method = handler_call_details.method

        def wrap(handler: Any) -> Any:
            return rewrapped(handler, lambda call: self._unary(call, method), lambda call: self._stream(call, method))

        return self._handlers.get(method, await continuation(handler_call_details), wrap)

    def end_untrusted_streams(self) -> None:
        """End the streams of peers whose certificate has ended or whose name is denied since they were opened."""
        for task, peer in list(self._streams.items()):
            if self._refusal(peer) is not None:
                task.cancel()

    def _unary(self, call: Any, method: str) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            await self._identify(context, method)
            return await call(request, context)

        return handle

    def _stream(self, call: Any, method: str) -> Any:
        async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
            peer = await self._identify(context, method)
            task = asyncio.current_task()
            assert task is not None
            self._streams[task] = peer
            try:
                async for response in responses_of(call, request, context):
                    yield response
            except asyncio.CancelledError:
                if (refusal := self._refusal(peer)) is None:
                    raise
                await abort(context, refusal)
            finally:
                self._streams.pop(task, None)

        return handle

    async def _identify(self, context: Any, method: str) -> Peer:
        peer = None
        try:
            peer = _peer_of(context, admits_strangers=self._admits_strangers)
            self._trust.check(peer)
        except EsperError as error:
            self._audit.refused(str(peer.spiffe_id) if peer else "unknown", method, error.reason)
            await abort(context, error)
        CURRENT_PEER.set(peer)
        return peer

    def _refusal(self, peer: Peer) -> EsperError | None:
        try:
            self._trust.check(peer)
        except EsperError as error:
            return error
        return None


def _peer_of(context: Any, *, admits_strangers: bool) -> Peer:
    facts = context.auth_context()
    if facts.get("ssl_tls_version", [b""])[0] != TLS_VERSION:
        raise Unauthenticated("This mesh speaks TLS 1.3 only.")
    names = facts.get("peer_spiffe_id", [])
    if not names and admits_strangers:
        return Peer(STRANGER)
    if len(names) != 1:
        raise Unauthenticated(f"A peer's certificate must hold exactly one SPIFFE id, this one holds {len(names)}.")
    try:
        return Peer(SpiffeId.parse(names[0].decode()), leaf_end(facts["x509_pem_cert"][0]))
    except (InvalidRequest, KeyError) as error:
        raise Unauthenticated(f"The peer's identity cannot be read: {error}") from error
