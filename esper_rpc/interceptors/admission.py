from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from esper_rpc.audit import AuditLog
from esper_rpc.concurrency import BULK, EPOCH, STEP, ConcurrencyLimit
from esper_rpc.errors import ResourceExhausted
from esper_rpc.identity.peer import CURRENT_PEER
from esper_rpc.quota import Quotas
from esper_rpc.status import abort

from .handlers import WrappedHandlers, responses_of, rewrapped

RANKS = {"EvaluateStep": STEP, "ApplyCommand": STEP, "EvaluateEpoch": EPOCH, "OpenRun": EPOCH, "Check": STEP}
"""By the name of the method; everything else is bulk."""


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Refuses at once, with the time to come back, what an identity or this server has no room for."""

    def __init__(self, quotas: Quotas, limit: ConcurrencyLimit, audit: AuditLog) -> None:
        self._quotas = quotas
        self._limit = limit
        self._audit = audit
        self._handlers = WrappedHandlers()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Take from the quota before the method runs, and hold a place while it does."""
        method = handler_call_details.method
        rank = RANKS.get(method.rpartition("/")[2], BULK)

        def wrap(handler: Any) -> Any:
            return rewrapped(
                handler, lambda call: self._unary(call, method, rank), lambda call: self._stream(call, method)
            )

        return self._handlers.get(method, await continuation(handler_call_details), wrap)

    def _unary(self, call: Any, method: str, rank: float) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            try:
                self._quotas.take(str(CURRENT_PEER.get().spiffe_id))
                place = self._limit.acquire(rank)
            except ResourceExhausted as error:
                await self._refuse(context, method, error)
            try:
                return await call(request, context)
            finally:
                self._limit.release(place)

        return handle

    def _stream(self, call: Any, method: str) -> Any:
        async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
            identity = str(CURRENT_PEER.get().spiffe_id)
            try:
                self._quotas.take(identity)
                self._quotas.open_stream(identity)
            except ResourceExhausted as error:
                await self._refuse(context, method, error)
            try:
                async for response in responses_of(call, request, context):
                    yield response
            finally:
                self._quotas.close_stream(identity)

        return handle

    async def _refuse(self, context: Any, method: str, error: ResourceExhausted) -> NoReturn:
        self._audit.refused(str(CURRENT_PEER.get().spiffe_id), method, error.reason)
        await abort(context, error)
