from __future__ import annotations

import torch
from torch import nn

from esper_servers.kasmina import lifecycle
from esper_servers.trainer.growing_seeds import GrowingSeeds


def test_seeds_that_grow_are_shown_with_the_gradients_that_they_have(rig):
    seeds = GrowingSeeds(rig.host)
    assert seeds.growing() == []
    rig.grow(lifecycle.TRAINING)
    assert [(each.seed_id, each.stage, each.gradients) for each in seeds.growing()] == [(rig.seed_id, "TRAINING", [])]
    nn.functional.cross_entropy(rig.model(rig.x), rig.y).backward()
    [found] = seeds.growing()
    module = rig.slot.site.seed
    assert [name for name, _ in found.gradients] == [name for name, _ in module.named_parameters()]
    assert all(torch.equal(given, dict(module.named_parameters())[name].grad) for name, given in found.gradients)
    rig.host.finalize_step(1)
    assert seeds.growing()[0].gradients == []


def test_a_fossil_grows_no_more(rig):
    rig.grow(lifecycle.FOSSILIZED)
    assert GrowingSeeds(rig.host).growing() == []
