from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import queue
import socket
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from google.rpc.status_pb2 import Status

from esper_rpc.errors import Unavailable
from esper_rpc.status import from_status, hide_unexpected, to_status

SENDING_SECONDS = 1.0
Frame = tuple[int, str | None, Any]
"""The number of a call, 0 where nobody waits; what is to be done with which arguments, or None and what came of it."""


class Link:
    """Calls between two processes of one program, over a socket pair that nobody else holds. Lives on one event loop.

    A call runs the method of that name of the other side's `target`. Arguments and results cross as multiprocessing has
    them cross, which must never meet a peer; errors as the status that they would have on the wire.
    """

    def __init__(self, target: object, end: socket.socket) -> None:
        self._target = target
        self._end = end
        self._connection = Connection(os.dup(end.fileno()))
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._awaited: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._sent, self._closed = asyncio.Event(), asyncio.Event()
        self._outgoing: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        # Two, since both sides may have much to say at once.
        for work in (self._receive, self._send):
            threading.Thread(target=work, name="step-process-link", daemon=True).start()

    async def call(self, name: str, *arguments: Any) -> Any:
        """Have the other side do something; raises EsperError as that side did, Unavailable when it is gone."""
        if self._closed.is_set():
            raise _gone()
        number = next(self._numbers)
        answer = self._awaited[number] = self._loop.create_future()
        self._outgoing.put((number, name, arguments))
        try:
            return await answer
        finally:
            del self._awaited[number]

    def tell(self, name: str, *arguments: Any) -> None:
        """Have the other side do something, whatever comes of it."""
        self._outgoing.put((0, name, arguments))

    async def until_closed(self) -> None:
        """Wait until the other side is gone, or this one was closed."""
        await self._closed.wait()

    async def close(self) -> None:
        """Hang up when all is sent, or soon; what is still awaited fails as Unavailable."""
        self._outgoing.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._sent.wait(), SENDING_SECONDS)
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)  # Wakes both threads.
        await self._closed.wait()
        self._end.close()

    def _send(self) -> None:
        """On a thread of its own."""
        with contextlib.suppress(OSError):
            while (frame := self._outgoing.get()) is not None:
                self._connection.send(frame)
        self._on_loop(self._sent.set)

    def _receive(self) -> None:
        """On a thread of its own."""
        try:
            while True:
                self._on_loop(self._take, self._connection.recv())
        except (EOFError, OSError):
            pass
        finally:
            self._outgoing.put(None)
            self._on_loop(self._hang_up)

    def _on_loop(self, work: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # A loop that has ended waits for nothing.
            self._loop.call_soon_threadsafe(work, *arguments)

    def _hang_up(self) -> None:
        self._closed.set()
        for answer in self._awaited.values():
            if not answer.done():
                answer.set_exception(_gone())

    def _take(self, frame: Frame) -> None:
        number, name, content = frame
        if name is not None:
            self._do(number, name, content)
        elif (answer := self._awaited.get(number)) is not None and not answer.done():
            result, error = content
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(from_status(Status.FromString(error)))

    def _do(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        """At once, so that what came first is done first; only what waits for something goes on beside."""
        try:
            found = getattr(self._target, name)(*arguments)
        except Exception as error:  # noqa: BLE001  # Whatever it is, it crosses as a status.
            self._reply_error(number, error)
            return
        if not inspect.isawaitable(found):
            self._reply(number, (found, None))
            return
        task = asyncio.ensure_future(self._await(number, found))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _await(self, number: int, found: Awaitable[Any]) -> None:
        try:
            self._reply(number, (await found, None))
        except Exception as error:  # noqa: BLE001  # As above.
            self._reply_error(number, error)

    def _reply_error(self, number: int, error: Exception) -> None:
        self._reply(number, (None, to_status(hide_unexpected(error)).SerializeToString()))

    def _reply(self, number: int, content: tuple[Any, bytes | None]) -> None:
        if number:
            self._outgoing.put((number, None, content))


def _gone() -> Unavailable:
    return Unavailable("The process on the other side has ended.", reason="PROCESS_ENDED")
