from __future__ import annotations

import asyncio

import pytest

from esper_rpc.errors import ResourceExhausted
from esper_rpc.testing import FakeClock
from esper_servers.tamiyo.turns.step_queue import FIRST_COST_SECONDS, StepQueue


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def queue(clock):
    return StepQueue(clock=clock)


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lone_step_has_its_turn_at_once_again_and_again(queue, clock):
    for _ in range(3):
        await queue.take_turn(clock(), 0.005)
        queue.end_turn()
        await settled()


async def test_the_step_that_is_due_first_goes_first(queue, clock):
    order = []

    async def ask(name, budget):
        await queue.take_turn(clock(), budget)
        order.append(name)
        queue.end_turn()

    await queue.take_turn(clock(), 1.0)
    waiting = [asyncio.create_task(ask(name, budget)) for name, budget in (("late", 0.9), ("soon", 0.1), ("mid", 0.5))]
    await settled()
    queue.end_turn()
    await asyncio.gather(*waiting)
    assert order == ["soon", "mid", "late"]


async def test_who_cannot_be_served_in_time_is_refused_at_once_with_a_time_to_come_back(queue, clock):
    await queue.take_turn(clock(), 1.0)
    with pytest.raises(ResourceExhausted) as caught:
        await queue.take_turn(clock(), FIRST_COST_SECONDS * 1.5)
    assert (caught.value.reason, caught.value.retry_after_ms) == ("OVERLOADED", 2)
    assert queue.refused == 1


async def test_who_waited_too_long_is_refused_when_the_turn_comes(queue, clock):
    await queue.take_turn(clock(), 1.0)
    late = asyncio.create_task(queue.take_turn(clock(), 0.05))
    patient = asyncio.create_task(queue.take_turn(clock(), 10.0))
    await settled()
    clock.advance(1.0)
    queue.end_turn()
    with pytest.raises(ResourceExhausted):
        await late
    await patient


async def test_who_will_be_refused_can_be_told_before_anything_else_is_done(queue, clock):
    queue.check_room(clock(), 0.0)
    await queue.take_turn(clock(), 1.0)
    with pytest.raises(ResourceExhausted):
        queue.check_room(clock(), FIRST_COST_SECONDS * 1.5)
    queue.check_room(clock(), 1.0)
    assert len(queue) == 0


async def test_a_full_queue_refuses_whatever_the_budget(clock):
    queue = StepQueue(capacity=2, clock=clock)
    await queue.take_turn(clock(), 1.0)
    waiting = [asyncio.create_task(queue.take_turn(clock(), 100.0)) for _ in range(2)]
    await settled()
    with pytest.raises(ResourceExhausted):
        await queue.take_turn(clock(), 100.0)
    for task in waiting:
        task.cancel()


async def test_a_caller_that_goes_away_passes_its_turn_on(queue, clock):
    await queue.take_turn(clock(), 1.0)
    gone = asyncio.create_task(queue.take_turn(clock(), 0.5))
    left_in_the_queue = asyncio.create_task(queue.take_turn(clock(), 0.6))
    heir = asyncio.create_task(queue.take_turn(clock(), 0.7))
    await settled()
    left_in_the_queue.cancel()
    queue.end_turn()
    await asyncio.sleep(0)
    gone.cancel()
    async with asyncio.timeout(5):
        await heir


async def test_the_cost_that_is_measured_decides_who_fits(queue, clock):
    for _ in range(200):
        await queue.take_turn(clock(), 1.0)
        clock.advance(0.0001)
        queue.end_turn()
        await settled()
    assert queue.cost_seconds == pytest.approx(0.0001, rel=0.1)


async def test_what_refusing_and_taking_in_costs_under_load_decides_too(queue, clock):
    """By the 10 ms of a turn alone five would fit; the intake between turns takes as long again."""

    async def ask():
        await queue.take_turn(clock(), 10.0)
        clock.advance(0.01)
        queue.end_turn()
        clock.advance(0.01)

    await asyncio.gather(*(ask() for _ in range(200)))
    await settled()
    await queue.take_turn(clock(), 10.0)
    waiting = [asyncio.create_task(queue.take_turn(clock(), 0.1)) for _ in range(8)]
    await settled()
    assert [task.done() for task in waiting] == [False] * 2 + [True] * 6
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_step_that_may_have_waited_unseen_is_taken_to_be_older(queue, clock):
    await queue.take_turn(clock(), 1.0)
    clock.advance(0.06)  # The evaluation held the loop, and what came meanwhile is seen only now.
    with pytest.raises(ResourceExhausted):
        async with asyncio.timeout(5):  # Admitted, it would wait for a turn that nobody gives.
            await queue.take_turn(clock(), 0.035)
