from __future__ import annotations

from typing import Any

import grpc

from esper_rpc.audit import AuditLog
from esper_rpc.errors import PermissionDenied
from esper_rpc.identity.authorisation import ADMIN_METHODS, Rows, authorise
from esper_rpc.identity.peer import CURRENT_PEER
from esper_rpc.status import abort

from .handlers import WrappedHandlers, guarded


class AuthorisationInterceptor(grpc.aio.ServerInterceptor):
    """Refuses a call that the peer's role may not make; refusals and admin calls go to the audit log."""

    def __init__(self, rows: Rows, audit: AuditLog) -> None:
        self._rows = rows
        self._audit = audit
        self._handlers = WrappedHandlers()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Check the role before the method runs."""
        method = handler_call_details.method

        async def check(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer = CURRENT_PEER.get().spiffe_id
            try:
                authorise(peer, method, self._rows)
            except PermissionDenied as error:
                self._audit.refused(str(peer), method, error.reason)
                await abort(context, error)
            if method in ADMIN_METHODS:
                self._audit.admitted(str(peer), method)

        handler = await continuation(handler_call_details)
        return self._handlers.get(method, handler, lambda found: guarded(found, check))
