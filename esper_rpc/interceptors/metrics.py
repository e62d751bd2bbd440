from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import grpc
from prometheus_client import Counter, Histogram

from esper_rpc.deferred import Deferred
from esper_rpc.telemetry import metrics

from .handlers import WrappedHandlers, responses_of, rewrapped

RECORDING_DELAY_SECONDS = 0.005
"""An answer has not left when its handler returns, and need not wait for its numbers."""
_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts and times every call of a known method, refused ones too (gRPC proposal A66)."""

    def __init__(self) -> None:
        self._handlers = WrappedHandlers()
        self._ended: deque[_Ended] = deque()
        self._recording = Deferred(RECORDING_DELAY_SECONDS, self._record)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Measure around everything further in."""
        method = handler_call_details.method.lstrip("/")

        def wrap(handler: Any) -> Any:
            return rewrapped(handler, lambda call: self._unary(call, method), lambda call: self._stream(call, method))

        return self._handlers.get(method, await continuation(handler_call_details), wrap)

    def _unary(self, call: Any, method: str) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            record, error = _CallRecord(method), None
            try:
                return record.sent(await call(record.received(request), context))
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._end(record, context, error)

        return handle

    def _stream(self, call: Any, method: str) -> Any:
        async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
            record, error = _CallRecord(method), None
            try:
                async for response in responses_of(call, record.received(request), context):
                    yield record.sent(response)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._end(record, context, error)

        return handle

    def _end(self, record: _CallRecord, context: Any, error: BaseException | None) -> None:
        self._ended.append((record, _status_of(context, error), time.perf_counter()))
        self._recording.ask()

    def _record(self) -> None:
        while self._ended:
            record, status, ended = self._ended.popleft()
            record.observe(status, ended)


class _CallRecord:
    """The numbers of one call until it ends."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._started = time.perf_counter()
        self._received = self._sent = 0
        _started(method).inc()

    def received(self, request: Any) -> Any:
        """Count a message, or every message of a stream."""
        if hasattr(request, "__aiter__"):
            return self._count_stream(request)
        self._received += _size(request)
        return request

    def sent(self, response: Any) -> Any:
        self._sent += _size(response)
        return response

    def observe(self, status: str, ended: float) -> None:
        """Tell the numbers of a call that has ended."""
        duration, received, sent = _histograms(self._method, status)
        duration.observe(ended - self._started)
        received.observe(self._received)
        sent.observe(self._sent)

    async def _count_stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._received += _size(request)
            yield request


_Ended = tuple[_CallRecord, str, float]
"""What was counted, the status, and when the call ended."""


@cache
def _started(method: str) -> Counter:
    return metrics.SERVER_STARTED.labels(method)


@cache
def _histograms(method: str, status: str) -> tuple[Histogram, Histogram, Histogram]:
    histograms = (metrics.SERVER_DURATION, metrics.SERVER_RECEIVED, metrics.SERVER_SENT)
    duration, received, sent = (histogram.labels(method, status) for histogram in histograms)
    return duration, received, sent


def _status_of(context: Any, error: BaseException | None) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    code = context.code() or 0  # A number until someone sets it.
    return code.name if isinstance(code, grpc.StatusCode) else _STATUS_NAMES.get(code, "UNKNOWN")


def _size(message: Any) -> int:
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())
