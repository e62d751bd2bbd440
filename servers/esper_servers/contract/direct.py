"""Calls a servicer object as a server does, without a server: authorisation, field rules, servicer, status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from esper_rpc import rules
from esper_rpc.errors import DeadlineExceeded, Unimplemented
from esper_rpc.identity import SpiffeId, authorise
from esper_rpc.server import Call
from esper_rpc.status import from_status, hide_unexpected, to_status

from .answer import CALL_SECONDS, Answer, as_dict, read_response
from .methods import name_of


class DirectTransport:
    """Reaches servicers in this process, by the full name of their service."""

    def __init__(self, servicers: Mapping[str, object], *, raw_methods: frozenset[str] = frozenset()) -> None:
        self._servicers = servicers
        self._raw_methods = raw_methods

    async def call(
        self, method: MethodDescriptor, messages: Sequence[bytes], caller: SpiffeId, wanted: int | None
    ) -> Answer:
        """Call a method of a servicer."""
        responses: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._call(method, messages, caller, wanted, responses)
        except TimeoutError:
            return Answer(tuple(responses), DeadlineExceeded("The call did not end."))
        except Exception as error:  # noqa: BLE001  # As at the edge of a server: whatever it is becomes a status.
            return Answer(tuple(responses), from_status(to_status(hide_unexpected(error))))
        return Answer(tuple(responses))

    async def _call(
        self,
        method: MethodDescriptor,
        messages: Sequence[bytes],
        caller: SpiffeId,
        wanted: int | None,
        responses: list[dict[str, Any]],
    ) -> None:
        path = f"/{name_of(method)}"
        authorise(caller, path)
        behaviour = getattr(self._servicers[method.containing_service.full_name], method.name, None)
        if behaviour is None:
            raise Unimplemented(f"{method.name} is not offered.")
        exchange = _Exchange(method, is_raw=method.name in self._raw_methods, wanted=wanted, responses=responses)
        await exchange.run(behaviour, messages, Call(path, caller))


class _Exchange:
    """One call in any of the four shapes."""

    def __init__(
        self, method: MethodDescriptor, *, is_raw: bool, wanted: int | None, responses: list[dict[str, Any]]
    ) -> None:
        self._method = method
        self._is_raw = is_raw
        self._wanted = wanted
        self._responses = responses

    async def run(self, behaviour: Any, messages: Sequence[bytes], call: Call) -> None:
        feed: asyncio.Queue[bytes | None] = asyncio.Queue()
        request = self._stream(feed) if self._method.client_streaming else self._admit(messages[0])
        if not self._method.server_streaming:
            self._feed(feed, [*messages, None])
            self._keep(await behaviour(request, call))
            return
        async with contextlib.aclosing(behaviour(request, call)) as answers:
            if self._method.client_streaming:
                await self._converse(feed, messages, answers)
            await self._read(answers)

    async def _converse(self, feed: asyncio.Queue[bytes | None], messages: Sequence[bytes], answers: Any) -> None:
        for message in messages:
            self._feed(feed, [message])
            self._keep(await anext(answers))
        self._feed(feed, [None])

    async def _read(self, answers: Any) -> None:
        while self._wanted is None or len(self._responses) < self._wanted:
            try:
                self._keep(await anext(answers))
            except StopAsyncIteration:
                return

    def _feed(self, feed: asyncio.Queue[bytes | None], messages: Sequence[bytes | None]) -> None:
        for message in messages:
            feed.put_nowait(message)

    async def _stream(self, feed: asyncio.Queue[bytes | None]) -> AsyncIterator[Any]:
        while (message := await feed.get()) is not None:
            yield self._admit(message)

    def _admit(self, raw: bytes) -> Message | bytes:
        if self._is_raw:
            return raw
        request = GetMessageClass(self._method.input_type).FromString(raw)
        rules.check(request)
        return request

    def _keep(self, response: Any) -> None:
        is_raw = isinstance(response, bytes)
        self._responses.append(read_response(self._method, response) if is_raw else as_dict(response))
