from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from esper_rpc.channel import ForkGuard

Result = TypeVar("Result")


class LoopThread:
    """An asyncio loop in a daemon thread: everything that talks to the mesh runs there."""

    def __init__(self, name: str = "esper-loop") -> None:
        self.fork = ForkGuard()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], *, timeout: float | None = None) -> Result:
        """Run a coroutine there and wait for it; it is cancelled when the time is over."""
        self.fork.check()
        running = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return running.result(timeout)
        finally:
            running.cancel()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine there without waiting."""
        self.fork.check()
        asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self) -> None:
        """Cancel what still runs there, and end the thread."""
        if self.fork.is_child or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
