from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

Before = Callable[[grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]


def guarded(handler: Any, before: Before) -> Any:
    """Return a handler that awaits `before` first, once per call or stream; `before` aborts what it refuses."""
    if handler is None:
        return None
    kind = (
        ("stream" if handler.request_streaming else "unary")
        + "_"
        + ("stream" if handler.response_streaming else "unary")
    )
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    wrap = _guard_stream if handler.response_streaming else _guard_unary
    return make(wrap(getattr(handler, kind), before), handler.request_deserializer, handler.response_serializer)


def _guard_unary(call: Any, before: Before) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        await before(context)
        return await call(request, context)

    return handle


def _guard_stream(call: Any, before: Before) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        await before(context)
        result = call(request, context)
        if not hasattr(result, "__aiter__"):
            # The health servicer of grpcio writes through the context instead of yielding.
            await result
            return
        async for response in result:
            yield response

    return handle
