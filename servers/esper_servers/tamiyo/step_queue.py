from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from esper_rpc.errors import ResourceExhausted

CAPACITY = 256
COST_SMOOTHING = 0.05
FIRST_COST_SECONDS = 0.002
QUIET_TURNS = 8
LONGEST_INTAKE_SECONDS = 0.005

Waiting = tuple[float, int, "asyncio.Future[None]"]
"""Latest start, order of arrival, what is awaited."""


class StepQueue:
    """Turns at the policy: one step at a time, the one whose answer is due first goes first.

    An evaluation holds the event loop, and gRPC hands over what arrived meanwhile one call after the other, a few turns
    of the loop each. So the next evaluation begins only when nothing arrives any more: until then whoever cannot be
    served inside the budget, by the cost that was measured, is refused at once, which costs little. Who waited too long
    is refused when the turn comes. Used on one event loop.
    """

    def __init__(self, *, capacity: int = CAPACITY, clock: Callable[[], float] = time.perf_counter) -> None:
        self._capacity = capacity
        self._clock = clock
        self._cost = FIRST_COST_SECONDS
        self._is_busy = False
        self._waiting: list[Waiting] = []
        self._order = itertools.count()
        self._began = 0.0
        self._arrivals = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def cost_seconds(self) -> float:
        """What one step costs, smoothed."""
        return self._cost

    async def take_turn(self, arrived: float, budget_seconds: float) -> None:
        """Wait for a turn; `end_turn` must follow. Raises ResourceExhausted with the time to come back."""
        latest_start = arrived + budget_seconds - self._cost
        self._arrivals += 1
        if self._is_busy:
            self._check_room(latest_start)
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (latest_start, next(self._order), turn))
            await self._wait(turn)
        self._is_busy = True
        self._began = self._clock()

    async def _wait(self, turn: asyncio.Future[None]) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give_next()  # It was this one's turn when its caller went away.
            raise

    def end_turn(self) -> None:
        """Give the turn back."""
        self._cost += COST_SMOOTHING * (self._clock() - self._began - self._cost)
        asyncio.get_running_loop().call_soon(self._take_in, self._arrivals, 0, self._clock())

    def _take_in(self, arrivals: int, quiet_turns: int, since: float) -> None:
        """Let the loop turn until nothing arrives; with nobody waiting the next comer need not wait either."""
        quiet_turns = quiet_turns + 1 if arrivals == self._arrivals else 0
        if not self._waiting or quiet_turns >= QUIET_TURNS or self._clock() - since > LONGEST_INTAKE_SECONDS:
            self._give_next()
        else:
            asyncio.get_running_loop().call_soon(self._take_in, self._arrivals, quiet_turns, since)

    def _check_room(self, latest_start: float) -> None:
        ahead = sum(1 for due, _, _ in self._waiting if due <= latest_start)
        is_full = len(self._waiting) >= self._capacity
        if is_full or self._clock() + (ahead + 1) * self._cost > latest_start:
            raise self._refusal()

    def _give_next(self) -> None:
        now = self._clock()
        while self._waiting:
            latest_start, _, turn = heapq.heappop(self._waiting)
            if turn.done():
                continue
            if latest_start < now:
                turn.set_exception(self._refusal())
                continue
            turn.set_result(None)
            return
        self._is_busy = False

    def _refusal(self) -> ResourceExhausted:
        self.refused += 1
        return ResourceExhausted(
            f"{len(self._waiting)} steps wait already, and each takes {self._cost * 1e3:.1f} ms.",
            reason="OVERLOADED",
            retry_after_ms=max(1, int((len(self._waiting) + 1) * self._cost * 1000)),
        )
