from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.errors import NotFound, PermissionDenied, Unavailable
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.tamiyo.step_processes.run_directory import RunDirectory

OPEN = OpenRunRequest(run_id="run")


class Holder:
    """Holds runs by name; what it hands over is a word."""

    def __init__(self, name):
        self.name = name
        self.runs = set()
        self.is_alive = True

    async def hand_over(self, run_id):
        await asyncio.sleep(0)
        if not self.is_alive:
            raise Unavailable("gone")
        if run_id not in self.runs:
            return None
        self.runs.remove(run_id)
        return f"{run_id} of {self.name}"

    async def open(self, directory, run_id="run", owner="owner"):
        carried = await directory.claim(OpenRunRequest(run_id=run_id), owner, self)
        self.runs.add(run_id)
        return carried


async def test_a_run_that_is_opened_elsewhere_comes_along():
    directory, one, other = RunDirectory(), Holder("one"), Holder("other")
    assert await one.open(directory) is None
    assert await one.open(directory) is None
    assert await other.open(directory) == "run of one"
    assert one.runs == set()


async def test_another_identity_is_refused_wherever_it_asks():
    directory, one, other = RunDirectory(), Holder("one"), Holder("other")
    await one.open(directory)
    for asked in (directory.claim(OPEN, "thief", other), directory.fetch("run", "thief", other)):
        with pytest.raises(PermissionDenied):
            await asked
    with pytest.raises(PermissionDenied):
        directory.check("run", "thief")
    assert one.runs == {"run"}
    directory.check("run", "owner")
    directory.check("run", None)


async def test_a_run_that_is_asked_about_elsewhere_moves_and_back():
    directory, one, other = RunDirectory(), Holder("one"), Holder("other")
    await one.open(directory)
    assert await directory.fetch("run", "owner", other) == "run of one"
    other.runs.add("run")
    assert await directory.fetch("run", "owner", other) is None
    assert await directory.fetch("run", "owner", one) == "run of other"


async def test_a_run_that_is_open_nowhere_is_not_found():
    directory, one = RunDirectory(), Holder("one")
    with pytest.raises(NotFound):
        await directory.fetch("run", "owner", one)
    with pytest.raises(NotFound):
        directory.check("run", None)


async def test_a_released_run_is_open_nowhere_and_free_for_another_owner():
    directory, one, other = RunDirectory(), Holder("one"), Holder("other")
    await one.open(directory)
    directory.release("run", other)
    directory.check("run", "owner")
    directory.release("run", one)
    with pytest.raises(NotFound):
        directory.check("run", None)
    assert await other.open(directory, owner="somebody else") is None


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "not-noticed-yet"])
async def test_the_runs_of_a_process_that_ended_go_with_it(is_noticed):
    directory, one, other = RunDirectory(), Holder("one"), Holder("other")
    await one.open(directory)
    one.is_alive = False
    if is_noticed:
        directory.release_all(one)
    with pytest.raises(NotFound):
        await directory.fetch("run", "owner", other)
    assert await other.open(directory) is None


async def test_every_claim_is_registered():
    registered = []
    directory = RunDirectory(registered.append)
    await Holder("one").open(directory, "a")
    await Holder("one").open(directory, "b")
    assert [request.run_id for request in registered] == ["a", "b"]


@given(moves=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.booleans()), max_size=12))
def test_whatever_is_asked_at_once_exactly_one_holds_a_run(moves):
    async def play():
        directory, holders = RunDirectory(), [Holder(str(number)) for number in range(3)]
        for run_id in "ab":
            await holders[0].open(directory, run_id)

        async def arrive(number, run_id, is_opened):
            holder = holders[number]
            if is_opened:
                await holder.open(directory, run_id)
            elif await directory.fetch(run_id, "owner", holder) is not None:
                holder.runs.add(run_id)

        await asyncio.gather(*(arrive(*move) for move in moves), return_exceptions=True)
        for run_id in "ab":
            assert sum(run_id in holder.runs for holder in holders) <= 1

    asyncio.run(play())
