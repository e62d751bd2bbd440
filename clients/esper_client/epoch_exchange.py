from __future__ import annotations

import asyncio
from concurrent.futures import Future

from esper_rpc.identity import Identity
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, StepDecision

from .client import TamiyoClient
from .event_loop import LoopThread


class EpochExchange:
    """Asks Tamiyo at the end of epochs, beside the training."""

    def __init__(self, address: str, *, identity: Identity, thread: LoopThread) -> None:
        self._address = address
        self._identity = identity
        self._thread = thread
        self._client: TamiyoClient | None = None

    def ask(self, request: EvaluateEpochRequest, timeout: float) -> Future[StepDecision]:
        """Ask and return at once; the future fails with what the call fails with."""
        return asyncio.run_coroutine_threadsafe(self._ask(request, timeout), self._thread.loop)

    async def close(self) -> None:
        """Close the channel."""
        if self._client is not None:
            await self._client.close()

    async def _ask(self, request: EvaluateEpochRequest, timeout: float) -> StepDecision:
        if self._client is None:
            self._client = TamiyoClient(self._address, identity=self._identity)
        return (await self._client.evaluate_epoch(request, timeout=timeout)).decision
