"""Many runs at once, each on a stream of its own, as trainers ask."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from google.rpc.status_pb2 import Status

from esper_rpc.channel import open_channel
from esper_rpc.errors import ResourceExhausted
from esper_rpc.identity import SpiffeId
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, EvaluateStepsResponse
from esper_rpc.status import from_status
from esper_servers.cli.home import Home

from .runtime import opening
from .scene import BenchHost
from .step import unary_step

METHOD = "/esper.tamiyo.v1.TamiyoService/EvaluateSteps"
TRAINERS = 8
"""A single identity may not open so many streams."""
_LOST_SECONDS = 5.0


@dataclass(slots=True)
class Answers:
    """Latencies in milliseconds by what came."""

    budget_ms: float
    decided: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    """Of the decided, what Tamiyo says that it took from the arrival on."""
    refused: list[float] = field(default_factory=list)
    expired: int = 0
    lost: int = 0

    def add(self, answer: EvaluateStepsResponse | None, latency_ms: float) -> None:
        """Sort an answer in; None stands for none at all."""
        if answer is None:
            self.lost += 1
        elif answer.decision.HasField("error"):
            self.refused.append(latency_ms)
        elif answer.decision.no_action.reason == "budget_exhausted":
            self.expired += 1
        else:
            self.decided.append(latency_ms)
            self.server.append(answer.decision.ledger.total_us / 1000)

    @property
    def in_time(self) -> int:
        """How many were decided within the budget."""
        return sum(latency <= self.budget_ms for latency in self.decided)

    @property
    def total(self) -> int:
        """How many were asked."""
        return len(self.decided) + len(self.refused) + self.expired + self.lost


class RunStream:
    """One run and its stream: a writer, a reader, and who waits for which step."""

    def __init__(self, channel: Any, host: BenchHost, run_id: str) -> None:
        # Made once: ten times what a server decides is asked by one process.
        self._step = unary_step(host, 0, [], run_id=run_id)
        self._sequence = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[EvaluateStepsResponse]] = {}
        self._call = channel.stream_stream(METHOD)()
        self._tasks = (asyncio.ensure_future(self._write(self._call)), asyncio.ensure_future(self._read(self._call)))

    async def ask(self, answers: Answers) -> float:
        """Ask one step, and sort in what comes; returns how many seconds the server wants to be left alone."""
        self._sequence += 1
        self._step.sequence, self._step.budget_us = self._sequence, int(answers.budget_ms * 1000)
        self._step.packet.global_step = self._sequence
        raw = EvaluateStepsRequest(step=self._step).SerializeToString()
        answer = asyncio.get_running_loop().create_future()
        self._waiting[self._sequence] = answer
        begun = time.perf_counter()
        self._outgoing.put_nowait(raw)
        try:
            found = await asyncio.wait_for(answer, _LOST_SECONDS)
        except TimeoutError:
            found = None
        answers.add(found, (time.perf_counter() - begun) * 1e3)
        if found is not None:
            self._settle(found.decision.command.nonce)
        return _pushback_seconds(found) if found is not None else 0.0

    def _settle(self, command_id: str) -> None:
        """Tell with the next step that a command came to nothing: a run that is silent about them is held back."""
        del self._step.outcomes[:]
        if command_id:
            self._step.outcomes.add(command_id=command_id, result=CommandOutcome.RESULT_REJECTED)

    async def close(self) -> None:
        """Leave the stream."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _read(self, call: Any) -> None:
        async for raw in call:
            response = EvaluateStepsResponse.FromString(raw)
            waiting = self._waiting.pop(response.decision.sequence, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(response)


def _pushback_seconds(response: EvaluateStepsResponse) -> float:
    if not response.decision.HasField("error"):
        return 0.0
    error = from_status(Status.FromString(response.decision.error.SerializeToString()))
    return error.retry_after_ms / 1e3 if isinstance(error, ResourceExhausted) else 0.0


async def open_runs(home: Home, address: str, count: int) -> tuple[list[Any], list[RunStream]]:
    """Open the runs, of eight trainers in turn; returns the channels and a stream for each run."""
    host = BenchHost(home)
    trainers = [home.issue_identity(SpiffeId("trainer", f"t{number}")) for number in range(TRAINERS)]
    for number in range(count):
        await opening(trainers[number % TRAINERS], address, host, run_id=f"run-{number}")
    channels = [open_channel(address, identity=trainer, role="tamiyo") for trainer in trainers]
    return channels, [RunStream(channels[n % TRAINERS], host, f"run-{n}") for n in range(count)]


async def close_runs(channels: list[Any], runs: list[RunStream]) -> None:
    """Leave every stream and close every channel."""
    for run in runs:
        await run.close()
    for channel in channels:
        await channel.close()
