from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from .errors import FailedPrecondition

NO_SAFE_POINT = "NO_SAFE_POINT"
Result = TypeVar("Result")
AtSafePoint = Callable[[Callable[[], Any]], "Future[Any]"]
"""Leaves work for the thread that trains, which alone may change the model."""


async def when_safe(at_safe_point: AtSafePoint, work: Callable[[], Result], *, seconds: float) -> Result:
    """Have work done at a safe point; what has begun is waited for, what has not is given up after a while.

    Raises:
        FailedPrecondition: When no safe point came.
    """
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def run() -> Result:
        loop.call_soon_threadsafe(begun.set)
        return work()

    done = at_safe_point(run)
    result: asyncio.Future[Result] = asyncio.wrap_future(done)
    try:
        async with asyncio.timeout(seconds):
            await begun.wait()
    except TimeoutError:
        if done.cancel():
            raise FailedPrecondition(
                "No safe point came: the training loop of this run stands still.", reason=NO_SAFE_POINT
            ) from None
    finally:
        done.cancel()  # Nobody waits for what has not begun; what has goes on.
    return await result
