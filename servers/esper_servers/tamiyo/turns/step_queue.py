from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from esper_rpc.config import Range, validate
from esper_rpc.errors import ResourceExhausted

from .company import Company
from .turn_cost import TurnCost

CAPACITY = 256
RELIEF = 0.2
"""How fast the time from turn to turn is forgotten by steps that find nobody before them."""
FIRST_COST_SECONDS = 0.002
QUIET_TURNS = 8
LEAST_INTAKE_SECONDS = 0.005
LONG_TURN_SECONDS = 0.003
TIGHTNESS_FORGOTTEN = 1.01
"""How fast shared turns may grow again, with each step, after one whose budget was tight."""
SLACK = 0.5
"""By what share a turn may take longer than predicted before those who share it are late, all of them at once."""
RESERVE = 0.2
"""The share of a budget that passes outside: before a step is seen here, and on the way back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How steps of several runs share a turn."""

    most: Annotated[int, Range(1, 64)] = 16
    """So many at most; 1 gives each step a turn of its own."""

    def __post_init__(self) -> None:
        validate(self)


class Waiting(NamedTuple):
    """A step that waits, in the order in which steps are served."""

    due: float
    """When it must be answered here."""
    order: int
    turn: asyncio.Future[Company[Any, Any] | None]
    sharer: Hashable
    """Who has one place in a turn at most; None goes alone."""


class StepQueue:
    """Turns at the policy, the step whose answer is due first before others. Who waits when a turn begins shares it.

    Nobody waits for company. As many of those who are due first share a turn as will all be answered in time by what
    turns of that size cost, from different runs; so nobody is overtaken. A shared turn is never so long that who comes
    when it has begun, with the tightest budget of late, would be refused for it, if a turn alone leaves room for that.

    Whoever cannot be served inside the budget is refused at once, which costs little. How long the wait will be is told
    by the turns that those ahead will make, and by the time from turn to turn that was measured while others waited:
    under load, taking in and refusing costs as much as deciding. Who waited too long all the same is refused when the
    turn comes.

    An evaluation that holds the event loop hides what arrives meanwhile, which gRPC then hands over one call after the
    other, a few turns of the loop each. So after one the next begins only when nothing arrives any more. Used on one
    event loop.
    """

    def __init__(
        self,
        *,
        capacity: int = CAPACITY,
        batch: BatchConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._capacity = capacity
        self._most = (batch or BatchConfig()).most
        self._clock = clock
        self._cost, self._interval = TurnCost(FIRST_COST_SECONDS), TurnCost(FIRST_COST_SECONDS)
        self._size = 0
        """How many have the turn, 0 while nobody does."""
        self._is_beside = False
        self._waiting: list[Waiting] = []
        self._order = itertools.count()
        self._began = 0.0
        self._quiet_at = 0.0
        self._arrivals = 0
        self._longest = math.inf
        """How long a shared turn may be for the tightest budget of late."""
        self.refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def cost_seconds(self) -> float:
        """What one step alone costs, smoothed."""
        return self._cost.first

    @property
    def has_long_turns(self) -> bool:
        """Whether turns had better leave the loop to others."""
        return self._cost.first > LONG_TURN_SECONDS

    def note_beside(self) -> None:
        """Say that this turn leaves the loop to others: what arrives meanwhile is seen at once."""
        self._is_beside = True

    def check_room(self, arrived: float, budget_seconds: float, sharer: Hashable = None) -> None:
        """Raise ResourceExhausted if `take_turn` would; for who is to be refused before anything else is done."""
        self._note_arrival(budget_seconds)
        if self._size:
            self._refuse_late(self._made(arrived, budget_seconds, sharer))

    async def take_turn(
        self, arrived: float, budget_seconds: float, sharer: Hashable = None
    ) -> Company[Any, Any] | None:
        """Wait for a turn; returns with whom it is shared. `end_turn` must follow.

        A `sharer` has one place in a turn at most; without one it goes alone. Raises ResourceExhausted with the time to
        come back.
        """
        self._note_arrival(budget_seconds)
        company = None
        if self._size:
            step = self._made(arrived, budget_seconds, sharer)
            self._refuse_late(step)
            bisect.insort(self._waiting, step)
            company = await self._wait(step.turn)
        else:
            self._interval.approach(self._cost, RELIEF)
            self._size, self._quiet_at = 1, arrived
        if company is None:
            self._is_beside = False
            self._began = self._clock()
        return company

    def _note_arrival(self, budget_seconds: float) -> None:
        self._arrivals += 1
        longest = (1 - RESERVE) * budget_seconds - self._interval.first - self._cost.first
        self._longest *= TIGHTNESS_FORGOTTEN
        if self._interval.first <= longest < self._longest:
            self._longest = longest

    async def _wait(self, turn: asyncio.Future[Company[Any, Any] | None]) -> Company[Any, Any] | None:
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # It was this one's turn when its caller went away.
                self._abandon(turn.result())
            raise

    def _abandon(self, company: Company[Any, Any] | None) -> None:
        self._size -= 1
        if company is None or company.leave():
            self._give_next()

    def end_turn(self, company: Company[Any, Any] | None = None) -> None:
        """Give the turn back; the next begins when the last of a company did."""
        if company is not None and not company.leave():
            return
        self._cost.learn(self._size, self._clock() - self._began)
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
        is_over = now - since > max(LEAST_INTAKE_SECONDS, self._cost.of(self._size))
        if not self._waiting or quiet_turns >= QUIET_TURNS or is_over:
            self._give_next()
        else:
            asyncio.get_running_loop().call_soon(self._take_in, self._arrivals, quiet_turns, since)

    def _made(self, arrived: float, budget_seconds: float, sharer: Hashable) -> Waiting:
        if self._is_beside:
            self._quiet_at = arrived
        # How long it waited unseen is not known: at most since there was nothing left to take in.
        due = self._quiet_at + (1 - RESERVE) * budget_seconds
        return Waiting(due, next(self._order), asyncio.get_running_loop().create_future(), sharer)

    def _refuse_late(self, step: Waiting) -> None:
        if len(self._waiting) >= self._capacity or self._answered_at(step) > step.due:
            raise self._refusal()

    def _answered_at(self, step: Waiting) -> float:
        """When a step is answered if it waits now: after those that are due before, and one that comes yet.

        With nobody to come there would be some who wait only to be refused.
        """
        ahead = bisect.bisect(self._waiting, step)
        start, first = max(self._clock(), self._began + self._interval.of(self._size)), 0
        if step.sharer is None or self._most == 1:
            return start + (ahead + 1) * self._interval.first + self._cost.first
        line = [*self._waiting[:ahead], step]
        while start <= step.due:
            size = self._sharing(line[first : first + self._most], start)
            first += size
            if first == len(line):
                return start + self._interval.first + self._cost.of(size)
            start += self._interval.of(size)
        return start

    def _sharing(self, line: Sequence[Waiting], start: float) -> int:
        """How many, from the first on, share a turn that starts then: as many as the first has time for."""
        sharers = {None, line[0].sharer}
        most = 1 if line[0].sharer is None else len(line)
        for size in range(2, most + 1):
            sharer = line[size - 1].sharer
            is_late = start + (1 + SLACK) * self._cost.of(size) > line[0].due
            if is_late or self._interval.of(size) > self._longest or sharer in sharers:
                return size - 1
            sharers.add(sharer)
        return most

    def _give_next(self) -> None:
        now = self._clock()
        self._drop_late(now)
        if not self._waiting:
            self._size = 0
            return
        if self._size:
            self._interval.learn(self._size, now - self._began)
        self._size = self._sharing(self._waiting[: self._most], now)
        members, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        company: Company[Any, Any] | None = None
        if self._size > 1:
            company, self._is_beside, self._began = Company(self._size), False, now
        for member in members:
            member.turn.set_result(company)

    def _drop_late(self, now: float) -> None:
        self._waiting = [step for step in self._waiting if not step.turn.done()]  # The others were given up.
        while self._waiting and self._waiting[0].due < now + self._cost.first:
            self._waiting.pop(0).turn.set_exception(self._refusal())

    def _refusal(self) -> ResourceExhausted:
        self.refused += 1
        full, rest = divmod(len(self._waiting) + 1, self._most)
        seconds = full * self._interval.of(self._most) + (self._interval.of(rest) if rest else 0.0)
        return ResourceExhausted(
            f"{len(self._waiting)} steps wait already, and one alone takes {self._interval.first * 1e3:.1f} ms.",
            reason="OVERLOADED",
            retry_after_ms=max(1, int(seconds * 1000)),
        )
