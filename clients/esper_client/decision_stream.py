from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from esper_rpc.errors import EsperError, Unavailable
from esper_rpc.identity import Identity, LiveIdentity
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, OpenRunRequest, StepDecision

from .connection import StepConnection

log = structlog.get_logger(__name__)

BACKOFF_SECONDS = (0.05, 1.0)
STREAM_AGE_SECONDS = 0.6 * 3600
"""Before the server asks for it: the default age of a stream there is an hour."""


class DecisionStream:
    """Keeps a connection to Tamiyo open for ever, and opens the next one before it leaves one that still works.

    Lives on the loop thread. A step whose connection breaks is sent again on the next one while it is awaited.
    """

    def __init__(
        self,
        *,
        address: str,
        identity: Identity,
        describe: Callable[[], OpenRunRequest],
        on_decision: Callable[[StepDecision], object],
        on_open: Callable[[StepConnection], object],
        is_awaited: Callable[[int], bool],
    ) -> None:
        self._address = address
        self._live = LiveIdentity(identity)
        self._describe = describe
        self._on_decision = on_decision
        self._on_open = on_open
        self._is_awaited = is_awaited
        self._current: StepConnection | None = None
        self._last: tuple[int, bytes] = (0, b"")
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_told = False
        self.opened = 0

    @property
    def is_open(self) -> bool:
        """Whether a step can be sent."""
        return self._current is not None and self._current.is_alive

    def send(self, sequence: int, raw: bytes) -> None:
        """Send a request; call it on the loop."""
        self._last = (sequence, raw)
        if self._current is not None and self._current.is_alive:
            self._current.send(raw)

    async def ask_epoch(self, question: EvaluateEpochRequest, timeout: float) -> StepDecision:
        """Ask at the end of an epoch, on the channel of the steps; raises EsperError."""
        if self._current is None or not self._current.is_alive:
            raise Unavailable(f"There is no connection to {self._address} at present.")
        return await self._current.ask_epoch(question, timeout)

    def replace(self) -> None:
        """Move to a new connection, for example because the certificate was renewed; call it on the loop."""
        if self._current is not None:
            self._current.must_be_replaced.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff, longest = BACKOFF_SECONDS
        while True:
            try:
                self._switch_to(await self._open())
            except Exception as error:  # noqa: BLE001  # Whatever failed, the next attempt may do.
                self._tell(error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, longest)
                continue
            backoff, self._is_told = BACKOFF_SECONDS[0], False
            assert self._current is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._current.must_be_replaced.wait(), STREAM_AGE_SECONDS)
            log.info("decision_stream_replaced", address=self._address, lost=not self._current.is_alive)

    def _tell(self, error: Exception) -> None:
        """Warn of the first failure in a row: the loop trains on, and somebody should know that it does so alone."""
        tell = log.info if self._is_told else log.warning
        tell(
            "decision_stream_not_opened",
            address=self._address,
            error=str(error)[:200],
            hint="training goes on without the mesh; `esper doctor` looks for what is wrong",
            exc_info=None if isinstance(error, EsperError) or self._is_told else error,
        )
        self._is_told = True

    async def _open(self) -> StepConnection:
        connection = StepConnection(
            self._address, identity=self._live.current(), on_decision=self._on_decision, on_lost=self._resend
        )
        return await connection.open(self._describe())

    def _switch_to(self, connection: StepConnection) -> None:
        before, self._current = self._current, connection
        self.opened += 1
        self._on_open(connection)
        if before is None:
            return
        if not before.is_alive:
            self._resend(before)
        retiring = asyncio.create_task(before.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    def _resend(self, lost: StepConnection) -> None:
        sequence, raw = self._last
        if lost is not self._current and self._is_awaited(sequence):
            self.send(sequence, raw)
