"""The comparison of blend modes; what it finds is not judged here."""

from __future__ import annotations

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


def test_a_mode_is_compared_with_convex_of_the_same_round():
    convex = [blend.Block(1.0, 2.0), blend.Block(10.0, 40.0), blend.Block(2.0, 4.0)]
    own = [blend.Block(1.1, 4.0), blend.Block(12.0, 80.0), blend.Block(2.1, 8.0)]
    assert blend._figures({"CONVEX": convex, "CHANNEL": own}, "CHANNEL") == {
        "step_ms": 2.1, "ratio_to_convex": 1.1, "ratio_low": 1.05, "ratio_high": 1.2, "over_convex_ms": 0.1,
        "wall_ms": 8.0, "wall_ratio_to_convex": 2.0,
    }  # fmt: skip


def test_a_short_run_has_the_keys_that_are_documented(monkeypatch):
    monkeypatch.setattr(blend, "LEAST_ROUNDS", 2)
    found = blend._compared(blend.Scene("mlp"), 0.0)
    assert found.pop("rounds") == 2
    assert set(found) == {mode.lower() for mode in BLEND_MODES}
    assert found["convex"]["ratio_to_convex"] == 1.0
    assert all(row["step_ms"] > 0 and row["wall_ms"] > 0 for row in found.values())
