from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import pickle
import socket
from typing import Any, Self

from google.rpc.status_pb2 import Status

from esper_rpc.errors import Unavailable
from esper_rpc.status import from_status, hide_unexpected, to_status

_LENGTH_BYTES = 8


class Link:
    """Calls between two processes of one program, over a socket pair that nobody else holds. Lives on one event loop.

    A call runs the method of that name of the other side's `target`. Arguments and results are pickled, errors cross as
    the status that they would have on the wire.
    """

    def __init__(self, target: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._target = target
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._awaited: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def open(cls, end: socket.socket, target: object) -> Self:
        """Take one end of a socket pair, and answer the other with this object's methods."""
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(target, reader, writer)

    async def call(self, name: str, *arguments: Any) -> Any:
        """Have the other side do something; raises EsperError as that side did, Unavailable when it is gone."""
        number = next(self._numbers)
        answer = self._awaited[number] = asyncio.get_running_loop().create_future()
        if self._receiving.done():
            raise _gone()
        try:
            self._send((number, name, arguments))
            return await answer
        finally:
            del self._awaited[number]

    def tell(self, name: str, *arguments: Any) -> None:
        """Have the other side do something, whatever comes of it."""
        if not self._receiving.done():
            self._send((0, name, arguments))

    async def until_closed(self) -> None:
        """Wait until the other side is gone, or this one was closed."""
        await asyncio.wait([self._receiving])

    async def close(self) -> None:
        """Hang up; what is still awaited fails as Unavailable."""
        self._receiving.cancel()
        await self.until_closed()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _send(self, frame: tuple[Any, ...]) -> None:
        body = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
        self._writer.write(len(body).to_bytes(_LENGTH_BYTES) + body)

    async def _receive(self) -> None:
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES))
                self._take(pickle.loads(await self._reader.readexactly(length)))  # noqa: S301  # Of this program.
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for answer in self._awaited.values():
                if not answer.done():
                    answer.set_exception(_gone())

    def _take(self, frame: tuple[Any, ...]) -> None:
        number, name, content = frame
        if name is not None:
            task = asyncio.create_task(self._answer(number, name, content))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif (answer := self._awaited.get(number)) is not None and not answer.done():
            result, error = content
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(from_status(Status.FromString(error)))

    async def _answer(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        content: tuple[Any, bytes | None]
        try:
            found = getattr(self._target, name)(*arguments)
            content = (await found if inspect.isawaitable(found) else found, None)
        except Exception as error:  # noqa: BLE001  # Whatever it is, it crosses as a status.
            content = (None, to_status(hide_unexpected(error)).SerializeToString())
        if number and not self._receiving.done():
            self._send((number, None, content))


def _gone() -> Unavailable:
    return Unavailable("The process on the other side has ended.", reason="PROCESS_ENDED")
