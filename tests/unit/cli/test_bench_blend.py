"""The comparison of blend modes; what it finds is not judged here."""

from __future__ import annotations

from collections import Counter

import pytest

from esper_rpc.blending import BLEND_MODES
from esper_servers.cli.bench import blend


@pytest.mark.parametrize("model", ["cnn", "transformer", "mlp"])
def test_every_mode_trains_the_seed_of_every_model(model):
    scene = blend.Scene(model)
    for mode in BLEND_MODES:
        scene.use(mode)
        before = [p.clone() for p in scene.seed.parameters()]
        scene.step()
        assert any(not a.equal(b) for a, b in zip(before, scene.seed.parameters(), strict=True))
    assert not scene.failure


def test_each_mode_is_as_often_at_each_place_and_before_each_other():
    rounds = [blend._in_turn(turn) for turn in range(8)]
    places = Counter((mode, place) for order in rounds for place, mode in enumerate(order))
    assert set(places.values()) == {2}
    assert {frozenset(order) for order in rounds} == {frozenset(BLEND_MODES)}


def test_a_mode_is_compared_with_convex_of_the_same_round():
    blocks = {mode: [1.0, 10.0, 2.0] for mode in BLEND_MODES} | {"CHANNEL": [1.1, 11.0, 2.2]}
    found = blend._figures(blocks, "CHANNEL")
    assert found == {"step_ms": 2.2, "ratio_to_convex": 1.1, "over_convex_ms": 0.2}


def test_a_short_run_has_the_keys_that_are_documented():
    found = blend._compared(blend.Scene("mlp"), 4)
    assert set(found) == {mode.lower() for mode in BLEND_MODES}
    assert found["convex"]["ratio_to_convex"] == 1.0
    assert all(row["step_ms"] > 0 for row in found.values())
