from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry.trace import SpanKind

from esper_rpc.telemetry.tracing import TRACEPARENT, TRACER, context_of

from .handlers import rewrapped


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Continues the trace of a unary call that carries one. Steps on a stream carry theirs in the message."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Span the method when the caller traces."""
        handler = await continuation(handler_call_details)
        traceparent = dict(handler_call_details.invocation_metadata or ()).get(TRACEPARENT)
        if handler is None or not traceparent:
            return handler
        return rewrapped(handler, _spanned(handler_call_details.method, str(traceparent)), lambda call: call)


def _spanned(method: str, traceparent: str) -> Callable[[Any], Any]:
    def wrap(call: Any) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            with TRACER.start_as_current_span(
                method.lstrip("/"),
                context=context_of(traceparent),
                kind=SpanKind.SERVER,
                attributes={"rpc.system": "grpc"},
            ):
                return await call(request, context)

        return handle

    return wrap
