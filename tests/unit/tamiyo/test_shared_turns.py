"""Who shares a turn, who goes alone, and who is refused for it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.errors import ConfigError, ResourceExhausted
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.turns.step_queue import FIRST_COST_SECONDS, RESERVE, BatchConfig, StepQueue

COST = FIRST_COST_SECONDS


class Recorded(StepQueue):
    """Notes who is given each turn, and when it should end by what turns have cost so far."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.given = []

    def _give_next(self):
        before = self._waiting
        super()._give_next()
        given = [step for step in before if step not in self._waiting and self._is_given(step.turn)]
        if given:
            self.given.append((self._clock() + self._cost.of(len(given)), given))

    @staticmethod
    def _is_given(turn):
        return turn.done() and not turn.cancelled() and turn.exception() is None


class Served:
    """A queue, and what was served by it: the size of each turn, by whom it was shared and when it began."""

    def __init__(self, most=16, first=COST, further=COST):
        self.clock = FakeClock()
        self.queue = Recorded(batch=BatchConfig(most=most), clock=self.clock)
        self.first, self.further = first, further
        self.turns = {}
        self.refused = []
        self._alone = 0

    async def ask(self, name, budget=1.0, sharer="", pauses=1):
        """Ask one step; the first of a company takes the time that the turn takes."""
        arrived = self.clock()
        try:
            company = await self.queue.take_turn(arrived, budget, name if sharer == "" else sharer)
        except ResourceExhausted:
            self.refused.append(name)
            return
        self._alone += company is None
        members = self.turns.setdefault(self._alone if company is None else company, [])
        members.append(name)
        try:
            if len(members) == 1:
                self.clock.advance(self.cost(1 if company is None else company.size))
            for _ in range(pauses):
                await asyncio.sleep(0)
        finally:
            self.queue.end_turn(company)

    def cost(self, size):
        """What a turn takes that so many share."""
        return self.first + (size - 1) * self.further

    @property
    def names(self):
        """The names by turn, in their order."""
        return list(self.turns.values())


async def hold(served):
    """Have the turn, so that others wait."""
    await served.queue.take_turn(served.clock(), 10.0)


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def serve(served, *asked, held=COST):
    """Serve steps of which all wait when a turn is given back."""
    await hold(served)
    tasks = [asyncio.create_task(served.ask(*each)) for each in asked]
    await settled()
    served.clock.advance(held)
    served.queue.end_turn()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_steps_of_different_runs_that_wait_share_the_next_turn():
    served = Served()
    await serve(served, ("a",), ("b",), ("c",))
    assert served.names == [["a", "b", "c"]]


async def test_nobody_waits_for_company():
    served = Served()
    await served.ask("a")
    await settled()
    await served.ask("b")
    assert served.names == [["a"], ["b"]]


async def test_a_turn_is_shared_by_as_many_as_are_allowed():
    served = Served(most=2)
    await serve(served, ("a",), ("b",), ("c",))
    assert served.names == [["a", "b"], ["c"]]
    assert len(served.queue) == 0


async def test_with_one_at_most_turns_are_not_shared():
    served = Served(most=1)
    await serve(served, ("a",), ("b",))
    assert served.names == [["a"], ["b"]]


async def test_a_run_never_has_two_places_in_a_turn():
    served = Served()
    await serve(served, ("a1", 0.5, "a"), ("b1", 0.6, "b"), ("a2", 0.7, "a"), ("c1", 0.8, "c"))
    assert served.names == [["a1", "b1"], ["a2", "c1"]]


async def test_who_goes_alone_shares_with_nobody_before_or_behind():
    served = Served()
    await serve(served, ("a", 0.5), ("alone", 0.6, None), ("b", 0.7), ("c", 0.8))
    assert served.names == [["a"], ["alone"], ["b", "c"]]


async def test_who_has_no_time_for_company_goes_first_and_alone():
    served = Served(further=COST / 2)
    await turns_of(served, 4, 100)
    await serve(served, ("slack", 1.0), ("more", 2.0), ("tight", 4 * COST / (1 - RESERVE)), held=2.7 * COST)
    assert served.names == [["tight"], ["slack", "more"]]


async def test_no_more_share_a_turn_than_the_first_of_them_has_time_for():
    served = Served()
    budget = (8.5 * COST) / (1 - RESERVE)
    await serve(served, ("a", budget), ("b", 1.0), ("c", 1.0), ("d", 1.0), ("e", 1.0), held=4.4 * COST)
    assert served.names == [["a", "b"], ["c", "d", "e"]]


async def test_a_shared_turn_leaves_room_for_one_that_comes_meanwhile_with_the_tightest_budget_of_late():
    served = Served()
    await served.ask("tight", 6.1 * COST / (1 - RESERVE))
    await settled()
    served.turns.clear()
    await serve(served, *((f"run{n}", 1.0) for n in range(10)))
    assert [len(names) for names in served.names] == [4, 4, 2]
    for _ in range(200):
        await served.ask("slack")
        await settled()
    served.turns.clear()
    await serve(served, *((f"run{n}", 1.0) for n in range(10)))
    assert [len(names) for names in served.names] == [10]


async def test_no_room_is_left_for_a_budget_that_a_turn_alone_would_spend():
    served = Served()
    await served.ask("hopeless", 2.9 * COST / (1 - RESERVE))
    await settled()
    served.turns.clear()
    await serve(served, *((f"run{n}", 1.0) for n in range(10)))
    assert [len(names) for names in served.names] == [10]


async def turns_of(served, count, times):
    """Have turns of so many measured."""
    for _ in range(times):
        await serve(served, *((f"m{n}", 10.0) for n in range(count)))
        await settled()
    served.turns.clear()


async def test_a_step_that_fits_only_in_company_is_admitted_once_company_was_measured():
    """Ten turns of 2 ms each are too long for the budget; one turn of ten takes 3 ms."""
    served = Served(further=COST / 20)
    budget = 8 * COST / (1 - RESERVE)
    crowd = [(f"run{n}", budget) for n in range(10)]
    await serve(served, *crowd)
    assert len(served.refused) >= 3
    await turns_of(served, 10, 60)
    served.refused.clear()
    await serve(served, *crowd)
    assert served.refused == []
    assert [len(names) for names in served.names] == [10]


async def test_without_company_the_same_crowd_is_refused_however_often_it_was_measured():
    served = Served(most=1, further=COST / 20)
    budget = 8 * COST / (1 - RESERVE)
    await turns_of(served, 10, 5)
    await serve(served, *((f"run{n}", budget) for n in range(10)))
    assert len(served.refused) >= 3


async def test_one_run_that_asks_ten_times_gains_nothing_by_company():
    served = Served(further=COST / 20)
    await turns_of(served, 10, 60)
    await serve(served, *((f"step{n}", 8 * COST / (1 - RESERVE), "run") for n in range(10)))
    assert len(served.refused) >= 3
    assert {len(names) for names in served.names} == {1}


async def test_who_waited_too_long_is_refused_and_the_others_share():
    served = Served()
    await hold(served)
    tasks = [asyncio.create_task(served.ask(name, budget)) for name, budget in (("late", 0.1), ("a", 5.0), ("b", 6.0))]
    await settled()
    served.clock.advance(0.2)
    served.queue.end_turn()
    await asyncio.gather(*tasks)
    assert (served.refused, served.names) == (["late"], [["a", "b"]])


async def test_one_that_goes_away_while_it_waits_leaves_its_place_to_others():
    served = Served()
    await hold(served)
    gone, *others = [asyncio.create_task(served.ask(name)) for name in ("gone", "a", "b")]
    await settled()
    gone.cancel()
    served.queue.end_turn()
    async with asyncio.timeout(5):
        await asyncio.gather(*others)
    assert served.names == [["a", "b"]]


async def test_members_that_go_away_before_they_begin_end_the_turn_with_the_last():
    served = Served()
    await hold(served)
    gone = [asyncio.create_task(served.queue.take_turn(served.clock(), budget, str(budget))) for budget in (1.0, 2.0)]
    await settled()
    served.queue._give_next()
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    async with asyncio.timeout(5):
        await served.ask("next")
    assert served.names == [["next"]]


async def test_while_one_member_is_slow_nobody_else_has_a_turn():
    served = Served()
    await hold(served)
    first, second, third = [
        asyncio.create_task(served.queue.take_turn(served.clock(), budget, str(budget))) for budget in (1.0, 2.0, 3.0)
    ]
    await settled()
    third.cancel()
    served.queue.end_turn()
    company = await first
    assert company is await second
    waiting = asyncio.create_task(served.ask("next"))
    served.queue.end_turn(company)
    await settled()
    assert not waiting.done()
    served.queue.end_turn(company)
    async with asyncio.timeout(5):
        await waiting


def test_a_most_out_of_range_is_named():
    with pytest.raises(ConfigError, match="most"):
        BatchConfig(most=65)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 5),  # Whose.
        st.floats(0.0005, 0.08),  # Budget.
        st.floats(0.0, 0.004),  # Since the one before arrived.
        st.integers(0, 3),  # Pauses in its turn.
        st.one_of(st.none(), st.integers(0, 6)),  # After how many turns of the loop its caller goes away.
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, most=st.integers(1, 8), further=st.floats(0.05, 1.0), warm=st.sampled_from([0, 40]))
def test_who_waited_is_answered_in_time_or_not_at_all_no_run_is_in_a_turn_twice_and_every_turn_ends(
    steps, most, further, warm
):
    """By a clock that moves as turns cost, whatever arrives, whoever goes away, and in whatever company."""

    async def leave(task, turns_of_the_loop):
        for _ in range(turns_of_the_loop):
            await asyncio.sleep(0)
        task.cancel()

    async def scene():
        served = Served(most=most, further=further * COST)
        await turns_of(served, most, warm)
        tasks, leaving = [], []
        for number, (run, budget, gap, pauses, goes) in enumerate(steps):
            served.clock.advance(gap)
            tasks.append(asyncio.create_task(served.ask(number, budget, f"run{run}", pauses)))
            await asyncio.sleep(0)
            if goes is not None:
                leaving.append(asyncio.create_task(leave(tasks[-1], goes)))
        await asyncio.wait_for(asyncio.gather(*tasks, *leaving, return_exceptions=True), 5)
        for expected_end, members in served.queue.given:
            runs = [step.sharer for step in members]
            assert len(runs) == len(set(runs)) <= most
            assert expected_end <= min(step.due for step in members) + 1e-9
        await settled()
        assert len(served.queue) == 0
        await served.ask("idle")
        assert served.names[-1] == ["idle"]

    asyncio.run(scene())
