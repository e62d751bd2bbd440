from __future__ import annotations

import pytest

from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.gates.config import GateConfig

PATIENCE = 15


@pytest.fixture
def grafted(make_crew):
    """Two ranks with a seed that blends, and what each is told of its loss from here on."""
    gates = GateConfig(loss_patience=PATIENCE, stage_patience=0)
    crew = make_crew(options={"gates": gates})
    crew.losses = [1.0, 1.0]
    for rank in crew.ranks:
        end_step = rank.end_step
        rank.end_step = lambda _loss, end=end_step, own=rank.ranks.rank: end(crew.losses[own])
    crew.grow("GERMINATE", "START_TRAINING", "START_GRAFTING")
    return crew


def stages(crew):
    return [slot.stage for slot in crew.slots]


def test_a_seed_that_is_out_of_patience_goes_on_every_rank_in_the_same_step(grafted):
    grafted.losses = [3.0, 3.0]
    grafted.train(PATIENCE - 1)
    assert stages(grafted) == [lifecycle.BLENDING] * 2
    grafted.train()
    assert stages(grafted) == [lifecycle.CULLED] * 2
    grafted.assert_alike()
    grafted.train(2)
    grafted.assert_alike()


def test_patience_goes_by_the_mean_of_what_the_ranks_lose(grafted):
    grafted.losses = [4.0, -2.0]
    grafted.train(2 * PATIENCE)
    assert stages(grafted) == [lifecycle.BLENDING] * 2
    grafted.losses = [1.0, 5.0]
    grafted.train(2 * PATIENCE)
    assert stages(grafted)[0] == stages(grafted)[1] != lifecycle.BLENDING
    grafted.assert_alike()
