from __future__ import annotations

import asyncio
import socket

import pytest

from esper_rpc.errors import Internal, NotFound, PermissionDenied, Unavailable
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.tamiyo.step_processes.link import Link


class Side:
    """What the tests let the other side do."""

    def __init__(self):
        self.heard = []
        self.gate = asyncio.Event()

    def add(self, one, other):
        return one + other

    async def refuse(self):
        raise NotFound("There is no such run.", reason="RUN_NOT_OPEN")

    async def fail(self):
        raise ZeroDivisionError("a secret")

    async def wait(self):
        await self.gate.wait()
        return "late"

    def hear(self, word):
        self.heard.append(word)


@pytest.fixture
async def sides():
    ends = socket.socketpair()
    targets = Side(), Side()
    links = [Link(target, end) for end, target in zip(ends, targets, strict=True)]
    yield *links, *targets
    for link in links:
        await link.close()


async def test_a_call_returns_what_the_other_side_does(sides):
    one, other, *_ = sides
    assert await one.call("add", 1, 2) == 3
    assert await other.call("add", "a", "b") == "ab"


async def test_messages_cross_whole(sides):
    one, *_ = sides
    request = OpenRunRequest(run_id="run", receiver_epoch=bytes(range(16)), host_topology=b"x" * 3_000_000)
    request.seeds.add(seed_id="s")
    assert await one.call("add", [request], []) == [request]


async def test_errors_cross_with_their_reason_and_unexpected_ones_without_their_words(sides):
    one, *_ = sides
    with pytest.raises(NotFound) as refused:
        await one.call("refuse")
    assert (refused.value.reason, refused.value.message) == ("RUN_NOT_OPEN", "There is no such run.")
    with pytest.raises(Internal) as failed:
        await one.call("fail")
    assert "secret" not in failed.value.message


async def test_calls_do_not_wait_for_each_other(sides):
    one, _, _, target = sides
    slow = asyncio.create_task(one.call("wait"))
    assert await one.call("add", 1, 1) == 2
    assert not slow.done()
    target.gate.set()
    assert await slow == "late"


async def test_what_is_told_arrives_in_order_before_the_next_call(sides):
    one, _, _, target = sides
    for number in range(100):
        one.tell("hear", number)
    await one.call("add", 0, 0)
    assert target.heard == list(range(100))


async def test_who_waits_learns_that_the_other_side_is_gone(sides):
    one, other, *_ = sides
    waiting = asyncio.create_task(one.call("wait"))
    await one.call("add", 0, 0)
    await other.close()
    with pytest.raises(Unavailable):
        await waiting
    await one.until_closed()
    with pytest.raises(Unavailable):
        await one.call("add", 1, 2)
    one.tell("hear", "nothing comes of it")


async def test_what_was_told_last_arrives_before_the_end(sides):
    one, other, _, target = sides
    for _ in range(100):
        one.tell("hear", "x" * 10_000)
    await one.close()
    await other.until_closed()
    assert len(target.heard) == 100


async def test_both_sides_may_have_much_to_say_at_once(sides):
    one, other, *_ = sides
    much = b"x" * 4_000_000
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(side.call("add", much, b"y") for side in (one, other)))
    assert answers == [much + b"y"] * 2


async def test_a_caller_that_gives_up_leaves_the_link_in_order(sides):
    one, _, _, target = sides
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(one.call("wait"), 0.01)
    target.gate.set()
    assert await one.call("add", 2, 2) == 4


async def test_a_cut_message_is_the_end(sides):
    one, other, *_ = sides
    waiting = asyncio.create_task(one.call("wait"))
    await one.call("add", 0, 0)
    other._end.send((100).to_bytes(4) + b"half")
    other._end.shutdown(socket.SHUT_WR)
    with pytest.raises(Unavailable):
        await waiting


async def test_the_owner_of_a_run_is_told_apart_from_others(sides):
    one, _, _, target = sides

    async def deny():
        raise PermissionDenied("Not yours.", reason="NOT_THE_OWNER")

    target.deny = deny
    with pytest.raises(PermissionDenied, match="Not yours"):
        await one.call("deny")
