"""The admin process: what takes long is computed there, because a busy Python thread would hold up every step."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

import structlog

from esper_rpc.errors import DeadlineExceeded, Unavailable

log = structlog.get_logger(__name__)

NICENESS = 19
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Aside:
    """Runs functions one after the other in a process of its own, which is started when it is first needed.

    Functions, arguments and results are pickled; they stay within this machine and this program.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(
        self,
        seconds: float,
        function: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Run a function there; raises what it raises, DeadlineExceeded after `seconds`, Unavailable when it died."""
        pool = self._pool = self._pool or _start()
        running = pool.submit(function, *arguments, **named)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(running), seconds)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(f"{function.__name__} took longer than {seconds:g} s.") from None
        except BrokenProcessPool as error:
            self.close()
            raise Unavailable(f"The process that ran {function.__name__} has died.") from error

    def close(self) -> None:
        """End the process, whatever it does; the next function gets a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):  # The public way would wait for the function.
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)


def _start() -> ProcessPoolExecutor:
    # A forked gRPC server would not survive.
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_settle)


def _settle() -> None:
    """Stand back behind the steps, and end with the process that serves them."""
    import torch

    os.nice(NICENESS)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # A drain of the server is not for this process to answer.
    threading.Thread(target=_end_with_the_parent, name="parent-watch", daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
