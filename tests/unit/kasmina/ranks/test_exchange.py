from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from esper_client.seed_host import OutOfStep
from esper_servers.tolaria.rollback.rank_exchange import collect, pack, receive, send, unpack

STATE = {
    "model": {"w": torch.arange(6.0).reshape(2, 3).t(), "half": torch.tensor(1.5, dtype=torch.bfloat16)},
    "other": {"on": torch.tensor([True, False]), "none": torch.zeros(0), "at": (3, float("nan")), "name": "ä\n"},
}


def assert_same(found):
    assert torch.equal(found["model"]["w"], STATE["model"]["w"])
    assert torch.equal(found["model"]["half"], STATE["model"]["half"])
    assert found["model"]["half"].dtype == torch.bfloat16
    assert torch.equal(found["other"]["on"], STATE["other"]["on"])
    assert found["other"]["none"].shape == (0,)
    assert found["other"]["at"][0] == 3
    assert found["other"]["name"] == "ä\n"


def at_once(*works):
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        return [future.exception() or future.result() for future in futures]


def test_a_state_gets_to_every_other_rank(rooms):
    first, *others = (each.ranks for each in rooms(3))
    found = at_once(lambda: send(first, STATE), *(lambda ranks=ranks: receive(ranks) for ranks in others))
    assert_same(found[1])
    assert_same(found[2])


@pytest.mark.parametrize("state", [None, {"model": {"w": object()}}])
def test_where_there_is_none_to_be_had_the_others_hear_so(rooms, state):
    first, second = (each.ranks for each in rooms(2))
    assert at_once(lambda: send(first, state), lambda: receive(second)) == [None, None]


def test_a_rank_that_is_lost_on_the_way_is_told_as_that(rooms):
    first, second = (each.ranks for each in rooms(2))
    errors = at_once(lambda: send(first, STATE), lambda: (second.share(), second.leave()))
    assert isinstance(errors[0], OutOfStep)


def test_what_is_a_ranks_own_is_packed_whole(rooms):
    ranks = [each.ranks for each in rooms(3)]
    told = at_once(*(lambda each=each: collect(each, pack(STATE) if each.rank == 2 else b"") for each in ranks))
    assert list(told[0]) == ["2"]
    assert_same(unpack(told[0]["2"]))
