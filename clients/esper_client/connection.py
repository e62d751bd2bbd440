from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Self

from esper_rpc.channel import open_channel

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.

from esper_rpc.errors import Unavailable
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import (
    EvaluateEpochRequest,
    EvaluateEpochResponse,
    EvaluateStepsResponse,
    OpenRunRequest,
    OpenRunResponse,
    StepDecision,
)
from esper_rpc.status import from_rpc_error

SERVICE = "/esper.tamiyo.v1.TamiyoService/"
OPEN_TIMEOUT_SECONDS = 2.0
GRACE_SECONDS = 30.0
GREETING_PROTOCOL = 2
GREETING = b""
"""A question without a step: its answer shows that the stream works."""


class StepConnection:
    """A channel to Tamiyo with the run opened on it and one EvaluateSteps stream. Lives on one event loop.

    There is a single writer: two writes at once kill a grpc.aio stream.
    """

    def __init__(
        self,
        address: str,
        *,
        identity: Identity,
        on_decision: Callable[[StepDecision], object],
        on_lost: Callable[[StepConnection], object],
    ) -> None:
        self._channel = open_channel(address, identity=identity, role="tamiyo")
        self._on_decision = on_decision
        self._on_lost = on_lost
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._greeted = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        self.is_alive = False
        self.must_be_replaced = asyncio.Event()
        """Set when it is lost, and when the server asks to go elsewhere."""
        self.server_clock_offset_ns = 0
        """The server's wall clock minus our monotonic clock."""
        self.run = OpenRunResponse()

    async def open(self, request: OpenRunRequest) -> Self:
        """Open the run and the stream, and exchange one message; raises EsperError."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                await self._open_run(request)
                await self._open_stream()
        except TimeoutError:
            await self.close()
            raise Unavailable(f"No answer within {OPEN_TIMEOUT_SECONDS:g} s.") from None
        except grpc.RpcError as error:
            await self.close()
            raise from_rpc_error(error) from error
        except BaseException:
            await self.close()
            raise
        return self

    def send(self, raw: bytes) -> None:
        """Queue a request."""
        self._outgoing.put_nowait(raw)

    async def ask_epoch(self, question: EvaluateEpochRequest, timeout: float) -> StepDecision:
        """Ask what to do at the end of an epoch, beside the stream; raises EsperError."""
        asking = asyncio.create_task(self._ask_epoch(question, timeout))
        self._tasks.append(asking)  # Whoever retires the connection waits for it.
        try:
            return await asking
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            self._tasks.remove(asking)

    async def retire(self) -> None:
        """Half-close, take the answers that are under way, and close."""
        self._outgoing.put_nowait(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await asyncio.wait(self._tasks)
        await self.close()

    async def close(self) -> None:
        """Close at once."""
        self._lose()
        for task in self._tasks:
            task.cancel()
        await self._channel.close()

    async def _open_run(self, request: OpenRunRequest) -> None:
        call: Any = self._channel.unary_unary(
            SERVICE + "OpenRun", OpenRunRequest.SerializeToString, OpenRunResponse.FromString
        )
        before = time.monotonic_ns()
        self.run = await call(request, timeout=OPEN_TIMEOUT_SECONDS)
        self.server_clock_offset_ns = self.run.server_time_ns - (before + time.monotonic_ns()) // 2

    async def _ask_epoch(self, question: EvaluateEpochRequest, timeout: float) -> StepDecision:
        call: Any = self._channel.unary_unary(
            SERVICE + "EvaluateEpoch", EvaluateEpochRequest.SerializeToString, EvaluateEpochResponse.FromString
        )
        answer: EvaluateEpochResponse = await call(question, timeout=timeout)
        return answer.decision

    async def _open_stream(self) -> None:
        call: Any = self._channel.stream_stream(SERVICE + "EvaluateSteps")()
        self._tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._read(call))]
        self.is_alive = True
        if self.run.protocol_version < GREETING_PROTOCOL:
            return
        self.send(GREETING)
        await self._greeted.wait()
        if not self.is_alive:
            raise Unavailable("The stream ended before its first answer.")

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while (raw := await self._outgoing.get()) is not None:
                await call.write(raw)
            await call.done_writing()

    async def _read(self, call: Any) -> None:
        try:
            async for raw in call:
                self._take(EvaluateStepsResponse.FromString(raw).decision)
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # Whoever opens the next connection learns why.
        finally:
            call.cancel()
            self._tasks[0].cancel()
            self._lose()

    def _take(self, decision: StepDecision) -> None:
        self._greeted.set()
        if decision.sequence:
            self._on_decision(decision)
        if decision.going_away:
            self.must_be_replaced.set()

    def _lose(self) -> None:
        was_alive, self.is_alive = self.is_alive, False
        self._greeted.set()
        self.must_be_replaced.set()
        if was_alive:
            self._on_lost(self)
