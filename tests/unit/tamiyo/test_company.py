from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_servers.tamiyo.turns.company import Company

SOON = 5.0


class Answering:
    """Answers a question with its negative, and counts how often it was asked; a question of None fails."""

    def __init__(self):
        self.sizes = []

    def __call__(self, questions):
        self.sizes.append(len(questions))
        return [KeyError("none") if question is None else -question for question in questions]


@pytest.fixture
def answering():
    return Answering()


def begin(company, answering, *questions):
    return [asyncio.create_task(company.ask(question, answering)) for question in questions]


async def test_nobody_is_answered_before_all_have_asked_and_then_everybody_at_once(answering):
    company = Company(3)
    tasks = begin(company, answering, 1, 2)
    await asyncio.sleep(0)
    assert answering.sizes == []
    async with asyncio.timeout(SOON):
        assert await company.ask(3, answering) == -3
        assert await asyncio.gather(*tasks) == [-1, -2]
    assert answering.sizes == [3]


async def test_who_leaves_without_asking_is_not_waited_for(answering):
    company = Company(3)
    tasks = begin(company, answering, 1, 2)
    await asyncio.sleep(0)
    assert not company.leave()
    async with asyncio.timeout(SOON):
        assert await asyncio.gather(*tasks) == [-1, -2]
    assert answering.sizes == [2]


async def test_the_last_to_leave_is_told_so():
    company = Company(3)
    assert [company.leave() for _ in range(3)] == [False, False, True]


async def test_one_that_cannot_be_answered_fails_alone(answering):
    company = Company(2)
    (failing,) = begin(company, answering, None)
    async with asyncio.timeout(SOON):
        assert await company.ask(2, answering) == -2
        with pytest.raises(KeyError):
            await failing


async def test_what_breaks_while_it_answers_reaches_everybody():
    def broken(_questions):
        raise ArithmeticError("broken")

    company = Company(2)
    found = await asyncio.gather(*begin(company, broken, 1, 2), return_exceptions=True)
    assert [type(each) for each in found] == [ArithmeticError] * 2


async def test_whose_caller_goes_away_asks_to_the_end_and_hears_of_it_afterwards(answering):
    heard = []

    async def ask():
        heard.append(await company.ask(1, answering))
        await asyncio.sleep(0)
        heard.append("went on")

    company = Company(2)
    gone = asyncio.create_task(ask())
    await asyncio.sleep(0)
    gone.cancel()
    async with asyncio.timeout(SOON):
        assert await company.ask(2, answering) == -2
        with pytest.raises(asyncio.CancelledError):
            await gone
    assert (answering.sizes, heard) == ([2], [-1])


async def test_who_insists_on_leaving_while_it_waits_is_left_out(answering):
    async def ask_and_leave():
        try:
            await company.ask(1, answering)
        finally:
            company.leave()

    company = Company(2)
    gone = asyncio.create_task(ask_and_leave())
    for _ in range(2):
        await asyncio.sleep(0)
        gone.cancel()
    await asyncio.wait([gone], timeout=SOON)
    async with asyncio.timeout(SOON):
        assert await company.ask(2, answering) == -2
    assert answering.sizes == [1]


async def test_what_fails_for_several_is_blamed_once_for_each_thing():
    company = Company(3)
    one, other = object(), object()
    assert [company.is_first_to_blame(each) for each in (one, one, other, one)] == [True, False, True, False]


ACTS = st.sampled_from(["ask", "leave", "raise", "cancel", "cancel twice"])


@settings(deadline=None)
@given(acts=st.lists(st.tuples(ACTS, st.integers(0, 3)), min_size=2, max_size=8))
def test_a_company_always_ends_whatever_its_members_do(acts):
    async def member(company, answering, number, act, pauses):
        try:
            for _ in range(pauses):
                await asyncio.sleep(0)
            if act == "raise":
                raise ValueError(act)
            if act != "leave":
                assert await company.ask(number + 1, answering) == -number - 1
        finally:
            ended.append(company.leave())

    async def meet():
        company, answering = Company(len(acts)), Answering()
        tasks = [asyncio.create_task(member(company, answering, n, *each)) for n, each in enumerate(acts)]
        for task, (act, pauses) in zip(tasks, acts, strict=True):
            for _ in range(("cancel" in act) + ("twice" in act)):
                for _ in range(pauses + 1):
                    await asyncio.sleep(0)
                task.cancel()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SOON)
        for (act, _), result in zip(acts, found, strict=True):
            assert result is None or isinstance(result, ValueError) == (act == "raise")
            assert not isinstance(result, AssertionError)

    ended = []
    asyncio.run(meet())
    assert ended == [False] * (len(acts) - 1) + [True]
