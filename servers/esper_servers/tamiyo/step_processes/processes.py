from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Annotated

import structlog

from esper_rpc.config import Range, validate
from esper_rpc.errors import EsperError, Unavailable

from .link import Link
from .peers import Admin, StepPeer

log = structlog.get_logger(__name__)

START_SECONDS = 60.0
END_SECONDS = 7.0
JOIN_SECONDS = 1.0
PING_SECONDS = 1.0
HUNG_SECONDS = 5.0
BACKOFF_SECONDS = (0.1, 10.0)
Main = Callable[[socket.socket], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProcessConfig:
    """How many processes answer steps at one address."""

    count: Annotated[int, Range(1, 64)] = 1

    def __post_init__(self) -> None:
        validate(self)


class StepProcesses:
    """Runs the step processes beside this one, and starts each again that ends. They end with this one."""

    def __init__(self, config: StepProcessConfig, admin: Admin) -> None:
        self._further = config.count - 1
        self._peers = admin.peers
        self._admin = admin
        self._keeping: list[asyncio.Task[None]] = []
        self._running: dict[StepPeer, BaseProcess] = {}

    async def start(self, main: Main) -> None:
        """Start them and wait until they serve; raises Unavailable. `main` is pickled and runs in each."""
        peers = await asyncio.gather(*(self._begin(main) for _ in range(self._further)))
        self._keeping = [asyncio.create_task(self._keep(main, peer)) for peer in peers]

    async def end(self) -> None:
        """Wait until all have ended, which were told to drain; who does not is killed."""
        for task in self._keeping:
            task.cancel()
        self._peers.begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                for peer in list(self._running):
                    await peer.link.until_closed()
        for peer in list(self._running):
            await self._let_go(peer)

    async def _keep(self, main: Main, peer: StepPeer) -> None:
        pause, longest = BACKOFF_SECONDS
        while True:
            await self._until_lost(peer)
            await self._let_go(peer)
            while True:
                await asyncio.sleep(pause)
                try:
                    peer = await self._begin(main)
                except (EsperError, OSError) as error:
                    log.error("step_process_not_started", error=str(error)[:200], priority="HIGH")
                    pause = min(2 * pause, longest)
                else:
                    pause = BACKOFF_SECONDS[0]
                    break

    async def _until_lost(self, peer: StepPeer) -> None:
        """Wait until a process has ended, or has to be ended because it does nothing any more."""
        closed = asyncio.create_task(peer.link.until_closed())
        try:
            while not closed.done():
                await asyncio.wait([closed], timeout=PING_SECONDS)
                if not await peer.answers(HUNG_SECONDS) and not closed.done():
                    log.error("step_process_hung", pid=self._running[peer].pid, priority="HIGH")
                    return
        finally:
            closed.cancel()

    async def _begin(self, main: Main) -> StepPeer:
        ours, theirs = socket.socketpair()
        with theirs:
            # A forked gRPC server would not survive.
            process = multiprocessing.get_context("spawn").Process(target=main, args=(theirs,), daemon=True)
            await asyncio.to_thread(process.start)
        peer = StepPeer(self._admin)
        peer.link = Link(peer, ours)
        self._running[peer] = process
        serving, ended = asyncio.create_task(peer.is_ready.wait()), asyncio.create_task(peer.link.until_closed())
        try:
            await asyncio.wait((serving, ended), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel(), ended.cancel()
        if not peer.is_ready.is_set():
            await self._let_go(peer)
            raise Unavailable("A step process ended, or did not serve in time; the log tells why.")
        log.info("step_process_serves", pid=process.pid)
        return peer

    async def _let_go(self, peer: StepPeer) -> None:
        process = self._running.pop(peer)
        self._peers.remove(peer)
        self._admin.directory.release_all(peer)
        await peer.link.close()
        await asyncio.to_thread(process.join, JOIN_SECONDS)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        if process.exitcode:
            log.error("step_process_ended", pid=process.pid, exit_code=process.exitcode, priority="HIGH")
