from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from esper_rpc.channel import open_channel
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, EvaluateStepsResponse
from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import Home

from . import echo
from .measure import machine, percentiles, rss_mb, scratch_home, show
from .runtime import opening
from .scene import BenchHost
from .step import unary_step

METHOD = "/esper.tamiyo.v1.TamiyoService/EvaluateSteps"
WORK_MS = 10.0
BUDGET_MS = 50.0
TRAINERS = 8
LOADS = (1, 2, 10)
RUNS = 200
"""So many that two steps of one run never wait at the same time: their order would matter."""
_CLOSED_LOOP = 4
_CAPACITY_SECONDS = 3.0
_LOST_SECONDS = 5.0


@dataclass(slots=True)
class Answers:
    """Latencies in milliseconds by what came."""

    decided: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    expired: int = 0
    lost: int = 0

    def add(self, answer: EvaluateStepsResponse | None, latency_ms: float) -> None:
        """Sort an answer in; None stands for none at all."""
        if answer is None:
            self.lost += 1
        elif answer.decision.HasField("error"):
            self.refused.append(latency_ms)
        elif answer.decision.no_action.reason == "nominal":
            self.decided.append(latency_ms)
        else:
            self.expired += 1

    @property
    def in_time(self) -> int:
        """How many were decided within the budget."""
        return sum(latency <= BUDGET_MS for latency in self.decided)

    @property
    def total(self) -> int:
        """How many were asked."""
        return len(self.decided) + len(self.refused) + self.expired + self.lost


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


class _Run:
    """One run and its stream: a writer, a reader, and who waits for which step."""

    def __init__(self, channel: Any, host: BenchHost, run_id: str) -> None:
        self._host, self._run_id = host, run_id
        self._sequence = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[EvaluateStepsResponse]] = {}
        call = channel.stream_stream(METHOD)()
        self._tasks = (asyncio.ensure_future(self._write(call)), asyncio.ensure_future(self._read(call)))

    async def ask(self, answers: Answers) -> None:
        """Ask one step, and sort in what comes."""
        self._sequence += 1
        step = unary_step(self._host, self._sequence, [], run_id=self._run_id)
        step.budget_us = int(BUDGET_MS * 1000)
        raw = EvaluateStepsRequest(step=step).SerializeToString()
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._sequence] = answer
        begun = time.perf_counter()
        self._outgoing.put_nowait(raw)
        try:
            found = await asyncio.wait_for(answer, _LOST_SECONDS)
        except TimeoutError:
            found = None
        answers.add(found, (time.perf_counter() - begun) * 1e3)

    def close(self) -> None:
        """Leave the stream."""
        for task in self._tasks:
            task.cancel()

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _read(self, call: Any) -> None:
        async for raw in call:
            response = EvaluateStepsResponse.FromString(raw)
            waiting = self._waiting.pop(response.decision.sequence, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(response)


class _Caller:
    """Asks on many streams without waiting for answers: an open loop."""

    def __init__(self, channels: list[Any], host: BenchHost) -> None:
        self._channels = channels
        self._runs = [_Run(channels[n % len(channels)], host, f"overload-{n}") for n in range(RUNS)]
        self._turn = 0

    @classmethod
    async def open(cls, home: Home, address: str) -> _Caller:
        """Open the runs and the channels, one of each trainer: a single one may not open so many streams."""
        host = BenchHost(home)
        trainers = [home.issue_identity(SpiffeId("trainer", f"t{number}")) for number in range(TRAINERS)]
        for number in range(RUNS):
            await opening(trainers[number % TRAINERS], address, host, run_id=f"overload-{number}")
        return cls([open_channel(address, identity=trainer, role="tamiyo") for trainer in trainers], host)

    async def capacity(self) -> float:
        """Return how many steps a second are decided when a few callers wait for each answer."""
        answers, begun = Answers(), time.perf_counter()

        async def ask_in_turn() -> None:
            while time.perf_counter() - begun < _CAPACITY_SECONDS:
                await self._next().ask(answers)

        await asyncio.gather(*(ask_in_turn() for _ in range(_CLOSED_LOOP)))
        return len(answers.decided) / (time.perf_counter() - begun)

    async def offer(self, rate: float, seconds: float) -> Answers:
        """Ask `rate` times a second and wait for the last answer."""
        answers, pending = Answers(), []
        begun = time.perf_counter()
        for index in range(int(rate * seconds)):
            pending.append(asyncio.create_task(self._next().ask(answers)))
            await asyncio.sleep(max(0.0, begun + index / rate - time.perf_counter()))
        await asyncio.gather(*pending)
        return answers

    async def close(self) -> None:
        """Leave every stream and close every channel."""
        for asking in self._runs:
            asking.close()
        for channel in self._channels:
            await channel.close()

    def _next(self) -> _Run:
        self._turn += 1
        return self._runs[self._turn % RUNS]
