from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import Home

from . import echo
from .measure import machine, percentiles, rss_mb, scratch_home, show
from .run_streams import Answers, RunStream, close_runs, open_runs

WORK_MS = 10.0
BUDGET_MS = 50.0
LOADS = (1, 2, 10)
RUNS = 200
"""So many that two steps of one run never wait at the same time: their order would matter."""
_CLOSED_LOOP = 4
_CAPACITY_SECONDS = 3.0


def overload(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=1, help="How long each load lasts.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Offer one, two and ten times what a controller was seen to decide, and see who is answered and how fast.

    Eight trainers ask for 200 runs on streams of their own. A policy that works 10 ms a step stands for a slow one,
    because no Python caller can offer ten times what a fast one decides. Every step has a budget of 50 ms and its own
    arrival time, whatever became of those before.
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
    return {
        "offered_per_s": round(answers.total / took, 1),
        "goodput_per_s": round(answers.in_time / took, 1),
        "decided": percentiles(answers.decided),
        "late_share": round(1 - answers.in_time / max(1, len(answers.decided)), 4),
        "refused_share": round(len(answers.refused) / max(1, answers.total), 4),
        "refused": percentiles(answers.refused),
        "expired_share": round(answers.expired / max(1, answers.total), 4),
        "lost": answers.lost,
    }


async def _recovery(caller: _Caller, capacity: float) -> float:
    """Seconds after the overload until half the capacity is decided within the budget again, all of it."""
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        answers = await caller.offer(capacity / 2, 0.25)
        if answers.in_time == answers.total:
            return round(started - begun, 2)


class _Caller:
    """Asks on many streams without waiting for answers: an open loop."""

    def __init__(self, channels: list[Any], runs: list[RunStream]) -> None:
        self._channels, self._runs = channels, runs
        self._turn = 0

    @classmethod
    async def open(cls, home: Home, address: str) -> _Caller:
        """Open the runs and the channels."""
        return cls(*await open_runs(home, address, RUNS))

    async def capacity(self) -> float:
        """Return how many steps a second are decided when a few callers wait for each answer, and as told to."""
        answers, begun = Answers(BUDGET_MS), time.perf_counter()

        async def ask_in_turn() -> None:
            while time.perf_counter() - begun < _CAPACITY_SECONDS:
                pushback_seconds = await self._next().ask(answers)
                await asyncio.sleep(pushback_seconds)

        await asyncio.gather(*(ask_in_turn() for _ in range(_CLOSED_LOOP)))
        return len(answers.decided) / (time.perf_counter() - begun)

    async def offer(self, rate: float, seconds: float) -> Answers:
        """Ask `rate` times a second and wait for the last answer."""
        answers, pending = Answers(BUDGET_MS), []
        begun = time.perf_counter()
        for index in range(int(rate * seconds)):
            pending.append(asyncio.create_task(self._next().ask(answers)))
            await asyncio.sleep(max(0.0, begun + index / rate - time.perf_counter()))
        await asyncio.gather(*pending)
        return answers

    async def close(self) -> None:
        """Leave every stream and close every channel."""
        await close_runs(self._channels, self._runs)

    def _next(self) -> RunStream:
        self._turn += 1
        return self._runs[self._turn % RUNS]
