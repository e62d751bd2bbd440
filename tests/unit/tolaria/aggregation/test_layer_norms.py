from __future__ import annotations

import math

import pytest
import torch

from esper_servers.tolaria.aggregation.layer_norms import SeedGradients, as_points, layer_norms


def seed(name, **layers):
    gradients = [(f"{layer}.{part}", value) for layer, parts in layers.items() for part, value in parts.items()]
    return SeedGradients(name, "TRAINING", gradients)


def test_the_norm_of_a_layer_is_over_all_of_its_parameters():
    [found] = layer_norms([seed("a", up={"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})], top=3)
    assert found == ("a", "TRAINING", "up", pytest.approx(5.0))


def test_the_largest_come_first_and_as_many_as_are_wanted():
    layers = {name: {"weight": torch.full((2,), float(size))} for name, size in zip("abcd", (1, 4, 2, 3), strict=True)}
    assert [each.layer for each in layer_norms([seed("s", **layers)], top=3)] == ["b", "d", "c"]


def test_of_many_seeds_the_first_are_told():
    seeds = [seed(str(number), up={"weight": torch.ones(2)}) for number in range(9)]
    assert [each.seed_id for each in layer_norms(seeds, top=3)] == ["0", "1", "2", "3"]


def test_what_is_no_number_and_a_seed_without_gradients_are_left_out():
    broken = seed("a", up={"weight": torch.tensor([math.nan])}, down={"weight": torch.tensor([2.0])})
    assert [each.layer for each in layer_norms([seed("z"), broken], top=3)] == ["down"]


def test_a_parameter_of_the_seed_itself_is_its_own_layer():
    assert layer_norms([SeedGradients("a", "BLENDING", [("scale", torch.ones(4))])], top=1)[0].layer == "scale"


def test_a_norm_is_a_metric_with_seed_stage_and_layer():
    [point] = as_points(layer_norms([seed("a", up={"weight": torch.ones(4)})], top=1))
    assert (point.name, point.value) == ("tolaria.grad_agg.seed.layer_norm", 2.0)
    assert dict(point.attributes) == {"seed_id": "a", "stage": "TRAINING", "layer": "up"}
