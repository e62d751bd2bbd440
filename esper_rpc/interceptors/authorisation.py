from __future__ import annotations

from typing import Any

import grpc
import structlog

from esper_rpc.errors import PermissionDenied
from esper_rpc.identity import authorise
from esper_rpc.status import abort

from .handlers import guarded
from .identity import peer_of

log = structlog.get_logger(__name__)


class AuthorisationInterceptor(grpc.aio.ServerInterceptor):
    """Refuses a call that the peer's role may not make, and logs the refusal."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Check the role before the method runs."""
        method = handler_call_details.method

        async def check(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer = peer_of(context)
            try:
                authorise(peer, method)
            except PermissionDenied as error:
                log.warning("call_refused", peer=str(peer), method=method)
                await abort(context, error)

        return guarded(await continuation(handler_call_details), check)
