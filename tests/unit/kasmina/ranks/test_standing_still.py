"""A rank that stands still amid a step or between two: the others wait for it, and are not given up."""

from __future__ import annotations

import pytest

from esper_client.seed_host import OutOfStep
from esper_servers.kasmina.ranks import lockstep


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch):
    monkeypatch.setattr(lockstep, "BEAT_SECONDS", 0.0)


def stand(rank, beats):
    """Stand still for so many beats that the others have heard, and one that they have not."""
    begun, begin = [], rank.ranks.begin_total
    rank.ranks.begin_total = lambda told: begun.append(told) or begin(told)
    while len(begun) <= beats:
        rank.host.stand()
    rank.ranks.begin_total = begin


@pytest.mark.parametrize("standing", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_the_others_wait_amid_a_step_and_all_go_on_together(make_crew, standing):
    crew = make_crew(size=3)
    crew.grow("GERMINATE", "START_TRAINING")

    def end_step(rank):
        if rank.ranks.rank in standing:
            stand(rank, 3)
        rank.end_step(float(rank.ranks.rank))

    assert crew.all_do(end_step) == [None] * 3
    assert len({rank.host._progress.loss for rank in crew.ranks}) == 1
    crew.train(2)
    crew.assert_alike()


def test_the_others_wait_between_two_steps(crew):
    crew.grow("GERMINATE", "START_TRAINING")
    told = []
    crew.first.host.between_steps(lambda: [told.append(crew.first.host.stand()) for _ in range(3)])
    crew.train(2)
    assert len(told) == 6
    crew.assert_alike()


@pytest.mark.parametrize("standing", [0, 1])
def test_a_rank_that_is_gone_ends_those_that_stand_still(crew, standing):
    rank, lost = crew.ranks[standing], crew.ranks[1 - standing]
    lost.ranks.leave()
    with pytest.raises(OutOfStep):
        stand(rank, 1)
