from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from esper_rpc.channel import open_channel
from esper_rpc.errors import DeadlineExceeded, ResourceExhausted
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest
from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import Home

from . import echo
from .measure import machine, percentiles, rss_mb, scratch_home, show
from .runtime import METHOD, opening
from .scene import BenchHost
from .step import unary_step

WORK_MS = 5.0
BUDGET_MS = 50.0
CONNECTIONS = 8
LOADS = (1, 2, 10)
RUNS = 200
"""So many that two steps of one run never wait at the same time: their order would matter."""
_CLOSED_LOOP = 4
_CAPACITY_SECONDS = 3.0


@dataclass(slots=True)
class Answers:
    """Latencies in milliseconds by what came."""

    decided: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    expired: int = 0
    failed: int = 0


def overload(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=1, help="How long each load lasts.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Offer one, two and ten times what a controller was seen to decide, and see who is answered and how fast.

    A policy that works 5 ms a step stands for a slow one, because no Python caller can offer ten times what a fast one
    decides. Every step has a budget of 50 ms and its own arrival time, whatever became of those before.
    """
    with (
        scratch_home() as home,
        echo.serving(home, environ_of(context), "constant-server", f"--work-ms={WORK_MS}") as at,
    ):
        document = run(_measure(home, at.address, at.pid, seconds))
    show("overload", document | {"machine": machine()}, as_json=as_json)


async def _measure(home: Home, address: str, pid: int, seconds: float) -> dict[str, Any]:
    caller = await _Caller.open(home, address)
    capacity = await caller.capacity()
    before = rss_mb(pid)
    document: dict[str, Any] = {"capacity_per_s": round(capacity, 1), "budget_ms": BUDGET_MS}
    for times in LOADS:
        document[f"load_{times}x"] = await _offered(caller, capacity * times, seconds)
    document["recovery_s"] = await _recovery(caller, capacity)
    document["rss_mb"] = {"before": before, "after": rss_mb(pid)}
    await caller.close()
    return document


async def _offered(caller: _Caller, rate: float, seconds: float) -> dict[str, Any]:
    begun = time.perf_counter()
    answers = await caller.offer(rate, seconds)
    took = time.perf_counter() - begun
    total = len(answers.decided) + len(answers.refused) + answers.expired + answers.failed
    return {
        "offered_per_s": round(total / took, 1),
        "goodput_per_s": round(len(answers.decided) / took, 1),
        "decided": percentiles(answers.decided),
        "refused_share": round(len(answers.refused) / max(1, total), 4),
        "refused": percentiles(answers.refused),
        "expired_share": round(answers.expired / max(1, total), 4),
        "failed": answers.failed,
    }


async def _recovery(caller: _Caller, capacity: float) -> float:
    """Seconds after the overload until half the capacity is decided within the budget again, all of it."""
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        answers = await caller.offer(capacity / 2, 0.25)
        if not answers.refused and not answers.expired and not answers.failed:
            return round(started - begun, 2)


class _Caller:
    """Asks on several connections without waiting for answers: an open loop."""

    def __init__(self, channels: list[Any], host: BenchHost) -> None:
        self._channels = channels
        self._calls = [channel.unary_unary(METHOD) for channel in channels]
        self._host = host
        self._sequence = 0

    @classmethod
    async def open(cls, home: Home, address: str) -> _Caller:
        """Open the runs and the channels."""
        identity, host = home.identity("trainer"), BenchHost(home)
        for number in range(RUNS):
            await opening(home, address, host, run_id=f"overload-{number}")
        return cls([open_channel(address, identity=identity, role="tamiyo") for _ in range(CONNECTIONS)], host)

    async def capacity(self) -> float:
        """Return how many steps a second are decided when a few callers wait for each answer."""
        answers, begun = Answers(), time.perf_counter()

        async def ask_on(index: int) -> None:
            while time.perf_counter() - begun < _CAPACITY_SECONDS:
                await self._ask(index, self._request(), answers)

        await asyncio.gather(*(ask_on(index) for index in range(_CLOSED_LOOP)))
        return len(answers.decided) / (time.perf_counter() - begun)

    async def offer(self, rate: float, seconds: float) -> Answers:
        """Ask `rate` times a second and wait for the last answer."""
        answers, pending = Answers(), []
        requests = [self._request() for _ in range(int(rate * seconds))]
        begun = time.perf_counter()
        for index, raw in enumerate(requests):
            pending.append(asyncio.create_task(self._ask(index, raw, answers)))
            await asyncio.sleep(max(0.0, begun + index / rate - time.perf_counter()))
        await asyncio.gather(*pending)
        return answers

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels:
            await channel.close()

    async def _ask(self, index: int, raw: bytes, answers: Answers) -> None:
        import grpc

        from esper_rpc.status import from_rpc_error

        begun = time.perf_counter()
        try:
            await self._calls[index % CONNECTIONS](raw, timeout=BUDGET_MS / 1e3)
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if isinstance(error, ResourceExhausted):
                answers.refused.append((time.perf_counter() - begun) * 1e3)
            elif isinstance(error, DeadlineExceeded):
                answers.expired += 1
            else:
                answers.failed += 1
            return
        answers.decided.append((time.perf_counter() - begun) * 1e3)

    def _request(self) -> bytes:
        self._sequence += 1
        run_id = f"overload-{self._sequence % RUNS}"
        step = unary_step(self._host, self._sequence, [], run_id=run_id)
        step.budget_us = int(BUDGET_MS * 1000)
        return EvaluateStepRequest(step=step).SerializeToString()
