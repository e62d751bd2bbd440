from __future__ import annotations

import asyncio

from esper_rpc.inbox import CAPACITY, Inbox


async def endless():
    number = 0
    while True:
        yield number
        number += 1
        await asyncio.sleep(0)


async def of(*items):
    for item in items:
        yield item


async def test_requests_come_in_order_and_the_inbox_ends_with_the_stream():
    async with Inbox(of(1, 2, 3)) as inbox:
        assert [request async for request in inbox] == [1, 2, 3]


async def test_more_than_it_holds_comes_through_whole():
    async with Inbox(of(*range(3 * CAPACITY))) as inbox:
        assert [request async for request in inbox] == list(range(3 * CAPACITY))


async def test_nothing_of_a_stream_that_was_left_stays_on_the_loop():
    async def silent():
        await asyncio.Event().wait()
        yield 0

    before = asyncio.all_tasks()
    async with Inbox(silent()) as inbox:
        pass
    (reader,) = asyncio.all_tasks() - before
    await asyncio.wait([reader], timeout=20)
    assert (reader.cancelled(), inbox._timer.cancelled()) == (True, True)


async def test_an_idle_stream_is_told_to_leave_and_ended_soon_after():
    async def silent():
        await asyncio.Event().wait()
        yield 0

    async with Inbox(silent(), linger_seconds=0.01) as inbox:
        inbox.leave()
        assert [request async for request in inbox] == [None]


async def test_a_flooding_stream_is_told_once_and_ended():
    async with Inbox(endless(), linger_seconds=0.05) as inbox:
        inbox.leave()
        inbox.leave()
        got = [request async for request in inbox]
    assert got.count(None) == 1
    requests = [request for request in got if request is not None]
    assert requests == list(range(len(requests)))


async def test_a_slow_reader_holds_the_sender_back():
    sent = []

    async def flood():
        for number in range(10 * CAPACITY):
            sent.append(number)
            yield number

    async with Inbox(flood()) as inbox:
        await anext(aiter(inbox))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(sent) <= CAPACITY + 2
