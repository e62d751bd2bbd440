from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from esper_rpc.channel import open_channel
from esper_rpc.errors import EsperError
from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsResponse, OpenRunRequest, OpenRunResponse, StepDecision
from esper_rpc.status import from_rpc_error

log = structlog.get_logger(__name__)

SERVICE = "/esper.tamiyo.v1.TamiyoService/"
OPEN_TIMEOUT_SECONDS = 2.0
BACKOFF_SECONDS = (0.05, 1.0)


class DecisionStream:
    """Keeps one EvaluateSteps stream to Tamiyo open, reconnecting for ever. Lives on the loop thread.

    There is a single writer: two writes at once kill a grpc.aio stream.
    """

    def __init__(
        self,
        *,
        address: str,
        identity: Identity,
        describe: Callable[[], OpenRunRequest],
        on_decision: Callable[[StepDecision], object],
        on_open: Callable[[OpenRunResponse, int], None],
    ) -> None:
        self._address = address
        self._identity = identity
        self._describe = describe
        self._on_decision = on_decision
        self._on_open = on_open
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_open = False
        self.opened = 0

    def send(self, raw: bytes) -> None:
        """Queue a request; call it on the loop."""
        self._outgoing.put_nowait(raw)

    def reopen(self) -> None:
        """End the stream and open the run again, because the host is another; call it on the loop."""
        if self.is_open:
            self.is_open = False
            self._outgoing.put_nowait(None)

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff = BACKOFF_SECONDS[0]
        while True:
            opened = self.opened
            try:
                await self._serve_once()
            except (EsperError, grpc.RpcError, asyncio.InvalidStateError) as error:
                log.info("decision_stream_lost", address=self._address, error=str(error)[:200])
            finally:
                self.is_open = False
            backoff = BACKOFF_SECONDS[0] if self.opened > opened else min(backoff * 2, BACKOFF_SECONDS[1])
            await asyncio.sleep(backoff)

    async def _serve_once(self) -> None:
        channel = open_channel(self._address, identity=self._identity, role="tamiyo")
        try:
            await self._open_run(channel)
            call: Any = channel.stream_stream(SERVICE + "EvaluateSteps")()
            await call.wait_for_connection()
            self._outgoing = asyncio.Queue()  # What was queued for the old stream has missed its step.
            self.is_open = True
            self.opened += 1
            writer = asyncio.create_task(self._write(call))
            try:
                await self._read(call)
            finally:
                writer.cancel()
                call.cancel()
        finally:
            self.is_open = False
            await channel.close()

    async def _open_run(self, channel: grpc.aio.Channel) -> None:
        call: Any = channel.unary_unary(
            SERVICE + "OpenRun", OpenRunRequest.SerializeToString, OpenRunResponse.FromString
        )
        before = time.monotonic_ns()
        try:
            response = await call(self._describe(), timeout=OPEN_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        middle = (before + time.monotonic_ns()) // 2
        self._on_open(response, response.server_time_ns - middle)

    async def _write(self, call: Any) -> None:
        while (raw := await self._outgoing.get()) is not None:
            await call.write(raw)
        await call.done_writing()

    async def _read(self, call: Any) -> None:
        async for raw in call:
            decision = EvaluateStepsResponse.FromString(raw).decision
            if decision.sequence:
                self._on_decision(decision)
            if decision.going_away:
                return
