from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from esper_rpc.errors import ResourceExhausted

CAPACITY = 256
COST_SMOOTHING = 0.05
RELIEF = 0.2
"""How fast the time from turn to turn is forgotten by steps that find nobody before them."""
FIRST_COST_SECONDS = 0.002
QUIET_TURNS = 8
LEAST_INTAKE_SECONDS = 0.005
LONG_TURN_SECONDS = 0.003
RESERVE = 0.2
"""The share of a budget that passes outside: before a step is seen here, and on the way back."""

Waiting = tuple[float, int, "asyncio.Future[None]"]
"""Latest start, order of arrival, what is awaited."""


class StepQueue:
    """Turns at the policy: one step at a time, the one whose answer is due first goes first.

    Whoever cannot be served inside the budget is refused at once, which costs little. How long the wait will be is told
    by the time from turn to turn that was measured while others waited: under load, taking in and refusing costs as
    much as deciding. Who waited too long all the same is refused when the turn comes.

    An evaluation that holds the event loop hides what arrives meanwhile, which gRPC then hands over one call after the
    other, a few turns of the loop each. So after one the next begins only when nothing arrives any more. Used on one
    event loop.
    """

    def __init__(self, *, capacity: int = CAPACITY, clock: Callable[[], float] = time.perf_counter) -> None:
        self._capacity = capacity
        self._clock = clock
        self._cost = self._interval = FIRST_COST_SECONDS
        self._is_busy = False
        self._is_beside = False
        self._waiting: list[Waiting] = []
        self._order = itertools.count()
        self._began = 0.0
        self._quiet_at = 0.0
        self._arrivals = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def cost_seconds(self) -> float:
        """What one step costs, smoothed."""
        return self._cost

    @property
    def has_long_turns(self) -> bool:
        """Whether turns had better leave the loop to others."""
        return self._cost > LONG_TURN_SECONDS

    def note_beside(self) -> None:
        """Say that this turn leaves the loop to others: what arrives meanwhile is seen at once."""
        self._is_beside = True

    def check_room(self, arrived: float, budget_seconds: float) -> None:
        """Raise ResourceExhausted if `take_turn` would; for who is to be refused before anything else is done."""
        self._arrivals += 1
        if self._is_busy:
            self._refuse_late(self._latest_start(arrived, budget_seconds))

    async def take_turn(self, arrived: float, budget_seconds: float) -> None:
        """Wait for a turn; `end_turn` must follow. Raises ResourceExhausted with the time to come back."""
        self._arrivals += 1
        latest_start = self._latest_start(arrived, budget_seconds)
        if self._is_busy:
            self._refuse_late(latest_start)
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (latest_start, next(self._order), turn))
            await self._wait(turn)
        else:
            self._interval += RELIEF * (self._cost - self._interval)
        self._is_busy, self._is_beside = True, False
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
        loop = asyncio.get_running_loop()
        if self._is_beside:
            loop.call_soon(self._give_next)
        else:
            loop.call_soon(self._take_in, self._arrivals, 0, self._clock())

    def _take_in(self, arrivals: int, quiet_turns: int, since: float) -> None:
        """Let the loop turn until nothing arrives, at most half the time; with nobody waiting nobody need wait."""
        quiet_turns = quiet_turns + 1 if arrivals == self._arrivals else 0
        now = self._clock()
        if quiet_turns >= QUIET_TURNS:
            self._quiet_at = now
        is_over = now - since > max(LEAST_INTAKE_SECONDS, self._cost)
        if not self._waiting or quiet_turns >= QUIET_TURNS or is_over:
            self._give_next()
        else:
            asyncio.get_running_loop().call_soon(self._take_in, self._arrivals, quiet_turns, since)

    def _latest_start(self, arrived: float, budget_seconds: float) -> float:
        if not self._is_busy or self._is_beside:
            self._quiet_at = arrived
        # How long it waited unseen is not known: at most since there was nothing left to take in.
        return self._quiet_at + (1 - RESERVE) * budget_seconds - self._cost

    def _refuse_late(self, latest_start: float) -> None:
        ahead = sum(1 for due, _, _ in self._waiting if due <= latest_start)
        is_full = len(self._waiting) >= self._capacity
        next_start = max(self._clock(), self._began + self._interval)
        # One more turn than is ahead: nobody is to wait only to be refused.
        if is_full or next_start + (ahead + 1) * self._interval > latest_start:
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
            self._interval += COST_SMOOTHING * (now - self._began - self._interval)
            turn.set_result(None)
            return
        self._is_busy = False

    def _refusal(self) -> ResourceExhausted:
        self.refused += 1
        return ResourceExhausted(
            f"{len(self._waiting)} steps wait already, and each takes {self._interval * 1e3:.1f} ms.",
            reason="OVERLOADED",
            retry_after_ms=max(1, int((len(self._waiting) + 1) * self._interval * 1000)),
        )
