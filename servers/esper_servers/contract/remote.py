"""Calls a server over mutual TLS, as any member of the mesh does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self

from google.protobuf.descriptor import MethodDescriptor

from esper_rpc.channel import MESSAGE_OPTIONS, open_channel

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.

from esper_rpc.errors import DeadlineExceeded
from esper_rpc.identity import Identity, SpiffeId
from esper_rpc.identity.peer import STRANGER
from esper_rpc.status import from_rpc_error

from .answer import CALL_SECONDS, Answer, read_response
from .case import NotApplicable
from .methods import CLIENTS, name_of

CONNECT_SECONDS = 3.0


class RemoteTransport:
    """Reaches services by their addresses; make it on the loop that uses it.

    `strangers` are the addresses of ports that ask for no client certificate.
    """

    def __init__(
        self,
        addresses: Mapping[str, str],
        identity: Callable[[SpiffeId], Identity],
        *,
        strangers: Mapping[str, str] | None = None,
    ) -> None:
        self._addresses = addresses
        self._strangers = strangers or {}
        self._identity = identity
        self._channels: dict[tuple[str, SpiffeId], grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def call(
        self, method: MethodDescriptor, messages: Sequence[bytes], caller: SpiffeId, wanted: int | None
    ) -> Answer:
        """Call an RPC as a member of the mesh."""
        channel = await self._channel(method.containing_service.full_name, caller)
        responses: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(CALL_SECONDS):
                async for raw in _exchange(channel, method, messages, wanted):
                    responses.append(read_response(method, raw))  # noqa: PERF401  # What came is kept if it breaks.
        except grpc.RpcError as error:
            return Answer(tuple(responses), from_rpc_error(error))
        except TimeoutError:
            return Answer(tuple(responses), DeadlineExceeded(f"No answer within {CALL_SECONDS:g} s."))
        return Answer(tuple(responses))

    async def _channel(self, service: str, caller: SpiffeId) -> grpc.aio.Channel:
        if (service, caller) not in self._channels:
            channel = self._channels[service, caller] = self._open(service, caller)
            # A handshake that fails on a busy machine is tried again; why one fails for good shows at the call.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    await channel.channel_ready()
        return self._channels[service, caller]

    def _open(self, service: str, caller: SpiffeId) -> grpc.aio.Channel:
        if caller.role == STRANGER.role:
            return self._open_strange(service)
        return open_channel(self._addresses[service], identity=self._identity(caller), role=CLIENTS[service].role)

    def _open_strange(self, service: str) -> grpc.aio.Channel:
        if service not in self._strangers:
            raise NotApplicable("the port for newcomers is not known")
        root_pem = self._identity(SpiffeId("operator", "local")).root_pem
        options = [("grpc.ssl_target_name_override", f"{CLIENTS[service].role}.esper"), *MESSAGE_OPTIONS]
        return grpc.aio.secure_channel(
            self._strangers[service], grpc.ssl_channel_credentials(root_pem), options=options
        )


async def _exchange(
    channel: Any, method: MethodDescriptor, messages: Sequence[bytes], wanted: int | None
) -> AsyncIterator[bytes]:
    path = f"/{name_of(method)}"
    if not method.server_streaming:
        yield await _one_answer(channel, path, method, messages)
        return
    if method.client_streaming:
        call = channel.stream_stream(path)()
        for message in messages:
            await _write(channel, path, call, message)
            yield await _next(call)
        await call.done_writing()
        wanted = None if wanted is None else wanted - len(messages)
    else:
        call = channel.unary_stream(path)(messages[0])
    async for raw in _read(call, wanted):
        yield raw


async def _one_answer(
    channel: grpc.aio.Channel, path: str, method: MethodDescriptor, messages: Sequence[bytes]
) -> bytes:
    call: Any = channel.stream_unary(path) if method.client_streaming else channel.unary_unary(path)
    answer: bytes = await call(_each(messages) if method.client_streaming else messages[0])
    return answer


async def _each(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def _write(channel: Any, path: str, call: Any, message: bytes) -> None:
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        return  # What ended the call shows when it is read.
    except grpc.aio.AioRpcError:
        # gRPC loses the status of a call that has ended when it is written to; a call without a message shows it.
        await channel.stream_stream(path)().read()
        raise


async def _next(call: Any) -> bytes:
    raw = await call.read()
    if raw is grpc.aio.EOF:
        raise TimeoutError  # The stream ended well, and a question has no answer.
    return raw  # type: ignore[no-any-return]  # Bytes: the channel has no deserialiser.


async def _read(call: Any, wanted: int | None) -> AsyncIterator[bytes]:
    count = 0
    while wanted is None or count < wanted:
        raw = await call.read()
        if raw is grpc.aio.EOF:
            return
        count += 1
        yield raw
    call.cancel()
