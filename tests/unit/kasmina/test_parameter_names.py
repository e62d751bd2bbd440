from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_rpc.errors import NotFound
from esper_servers.kasmina import lifecycle


@pytest.fixture
def grown(rig):
    rig.grow(lifecycle.TRAINING)
    return rig


def test_what_is_not_the_seeds_is_told_with_its_owner_in_the_order_of_the_question(grown):
    own = f"{grown.seed_id}/up.weight"
    other = grown.seed_ids[0]
    assert grown.host.foreign_parameters(grown.seed_id, ["4.weight", own, "0.bias"]) == [
        ("4.weight", "host"), ("0.bias", "host"),
    ]  # fmt: skip
    assert grown.host.foreign_parameters(other, [own]) == [(own, grown.seed_id)]


def test_without_names_those_of_the_seed_are_looked_at(grown):
    assert grown.host.foreign_parameters(grown.seed_id, []) == []
    assert grown.host.foreign_parameters(grown.seed_ids[0], []) == []
    # Tied behind our back, after it was planted.
    grown.slot.site.seed.up.weight = grown.model[2].weight
    assert grown.host.foreign_parameters(grown.seed_id, []) == [(f"{grown.seed_id}/up.weight", "host")]


def test_a_teacher_is_an_owner_too(grown):
    teacher = nn.Linear(8, 8)
    grown.host.register_teacher("teacher", teacher)
    grown.slot.site.seed.up.weight = teacher.weight
    assert grown.host.foreign_parameters(grown.seed_id, []) == [(f"{grown.seed_id}/up.weight", "teacher")]


def test_asking_is_no_violation(grown):
    for _ in range(5):
        assert grown.host.foreign_parameters(grown.seed_id, ["0.weight"])
    grown.train()
    assert grown.slot.stage == lifecycle.TRAINING
    assert grown.told("parameter.violation") == []


def test_a_model_that_was_cast_is_known_anew(grown):
    grown.model.double()
    with torch.no_grad():
        assert grown.host.foreign_parameters(grown.seed_id, ["0.weight"]) == [("0.weight", "host")]


@pytest.mark.parametrize(("seed_id", "names"), [("nobody", []), (None, ["9.weight"]), (None, ["nobody/weight"])])
def test_what_is_not_there_is_not_found(grown, seed_id, names):
    with pytest.raises(NotFound, match=(names or [seed_id])[0]):
        grown.host.foreign_parameters(seed_id or grown.seed_id, names)
