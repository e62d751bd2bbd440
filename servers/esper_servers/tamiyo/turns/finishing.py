from __future__ import annotations

import asyncio
from typing import TypeVar

Result = TypeVar("Result")


async def finished(future: asyncio.Future[Result]) -> Result:
    """Wait for what was begun, although the caller may go away; it is told so at its next wait."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        task.cancel()
        return future.result()
