from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Protocol, Self, TypeVar

from esper_rpc.channel import ForkGuard, open_channel, retry_config

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.errors import DeadlineExceeded, Internal, Unavailable
from esper_rpc.identity import Identity, LiveIdentity
from esper_rpc.status import from_rpc_error
from esper_rpc.telemetry.tracing import TRACEPARENT, current_traceparent

HAND_OVER_SECONDS = 30.0
CLIENT_BREAKER = BreakerConfig(failures=5, cool_down_seconds=5.0, successes=1)
FAILURES = (Unavailable, DeadlineExceeded, Internal)
"""What says that the peer is not well; any other error is an answer."""


class Parsed(Protocol):
    """A generated message class, as far as a client needs it."""

    @classmethod
    def FromString(cls, s: bytes) -> Self:
        """Parse."""
        ...


Response = TypeVar("Response", bound=Parsed)


def _trace_metadata() -> tuple[tuple[str, str], ...] | None:
    traceparent = current_traceparent()
    return ((TRACEPARENT, traceparent),) if traceparent else None


class MeshClient:
    """A channel to one service. Make it on the event loop that uses it; close it there.

    When the identity's files are renewed, the next call goes over a new channel; calls in flight end on the old one.
    """

    role = ""
    service = ""
    retried: tuple[str, ...] = ()
    """Idempotent methods, which gRPC retries when the server is unavailable or pushes back."""

    def __init__(self, address: str, *, identity: Identity, breaker: BreakerConfig = CLIENT_BREAKER) -> None:
        self._fork = ForkGuard()
        self._address = address
        self._live = LiveIdentity(identity)
        self._identity = identity
        self._channel = self._open(identity)
        self._breaker_config = breaker
        self._breakers: dict[str, CircuitBreaker] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        for task in self._closing:
            task.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _path(self, method: str) -> str:
        self._fork.check()
        self._follow_identity()
        return f"/{self.service}/{method}"

    def _follow_identity(self) -> None:
        current = self._live.current()
        if current is self._identity:
            return
        closing = asyncio.create_task(self._channel.close(HAND_OVER_SECONDS))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._identity = current
        self._channel = self._open(current)

    def _open(self, identity: Identity) -> grpc.aio.Channel:
        return open_channel(
            self._address, identity=identity, role=self.role, service_config=retry_config(self.service, self.retried)
        )

    def _breaker(self, method: str) -> CircuitBreaker:
        """The breaker of this peer and method; raises Unavailable while it is open."""
        breaker = self._breakers.setdefault(method, CircuitBreaker(config=self._breaker_config))
        if not breaker.allow():
            raise Unavailable(
                f"{self.service}/{method} at {self._address} failed too often; it is asked again in"
                f" {self._breaker_config.cool_down_seconds:g} s.",
                reason="BREAKER_OPEN",
            )
        return breaker

    async def _unary(self, method: str, request: Any, response: type[Response], timeout: float) -> Response:
        path, breaker = self._path(method), self._breaker(method)
        call: Any = self._channel.unary_unary(path, type(request).SerializeToString, response.FromString)
        try:
            answer = await call(request, timeout=timeout, metadata=_trace_metadata())
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            (breaker.record_failure if isinstance(error, FAILURES) else breaker.record_success)()
            raise error from rpc_error
        except asyncio.CancelledError:
            breaker.let_go()
            raise
        breaker.record_success()
        return answer  # type: ignore[no-any-return]  # response.FromString made it.

    async def _upload(
        self, method: str, requests: AsyncIterable[Any], request: Any, response: type[Response], timeout: float
    ) -> Response:
        path = self._path(method)
        call: Any = self._channel.stream_unary(path, request.SerializeToString, response.FromString)(timeout=timeout)
        try:
            # A server that refuses ends the call while we still write; why stands in the call's status.
            with contextlib.suppress(asyncio.InvalidStateError):
                async for part in requests:
                    await call.write(part)
                await call.done_writing()
            return await call  # type: ignore[no-any-return]  # response.FromString made it.
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def _download(
        self, method: str, request: Any, response: type[Response], timeout: float | None
    ) -> AsyncIterator[Response]:
        path = self._path(method)
        call: Any = self._channel.unary_stream(path, type(request).SerializeToString, response.FromString)
        try:
            async for message in call(request, timeout=timeout):
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def _bidi(
        self, method: str, requests: AsyncIterable[Any], request: Any, response: type[Response]
    ) -> AsyncIterator[Response]:
        path = self._path(method)
        call: Any = self._channel.stream_stream(path, request.SerializeToString, response.FromString)
        try:
            async for message in call(requests):
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
