from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

Before = Callable[[grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]
Wrap = Callable[[Any], Any]
"""Takes the behaviour of a handler, gives another."""


class WrappedHandlers:
    """The wrapped handler of every method, made once: interceptors are asked anew at each call."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, Any]] = {}

    def get(self, method: str, handler: Any, wrap: Wrap) -> Any:
        """Return what `wrap` made of this handler; None for a method that nobody offers."""
        if handler is None:
            return None
        known = self._known.get(method)
        if known is None or known[0] is not handler:
            known = self._known[method] = (handler, wrap(handler))
        return known[1]


def guarded(handler: Any, before: Before) -> Any:
    """Return a handler that awaits `before` first, once per call or stream; `before` aborts what it refuses."""
    return rewrapped(handler, lambda call: _guard_unary(call, before), lambda call: _guard_stream(call, before))


def rewrapped(handler: Any, unary: Wrap, stream: Wrap) -> Any:
    """Return a handler with its behaviour wrapped, by `stream` when it answers with many messages."""
    kind = (
        ("stream" if handler.request_streaming else "unary")
        + "_"
        + ("stream" if handler.response_streaming else "unary")
    )
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    wrap = stream if handler.response_streaming else unary
    return make(wrap(getattr(handler, kind)), handler.request_deserializer, handler.response_serializer)


async def responses_of(call: Any, request: Any, context: Any) -> AsyncIterator[Any]:
    """Yield the responses of a streaming behaviour, whichever way it gives them."""
    result = call(request, context)
    if not hasattr(result, "__aiter__"):
        # The health servicer of grpcio writes through the context instead of yielding.
        await result
        return
    async for response in result:
        yield response


def _guard_unary(call: Any, before: Before) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        await before(context)
        return await call(request, context)

    return handle


def _guard_stream(call: Any, before: Before) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        await before(context)
        async for response in responses_of(call, request, context):
            yield response

    return handle
