from __future__ import annotations

import pytest

from esper_rpc.blending import BLENDING_METHODS
from esper_servers.kasmina import lifecycle

ALWAYS = {
    "alpha", "alpha_steps", "alpha_total_steps", "alpha_temperature", "alpha_schedule", "blend_allowed", "risk_tolerance",
}  # fmt: skip


def state_of(rig):
    return {state.seed_id: state for state in rig.host.export_seed_states()}[rig.seed_id]


def test_a_seed_that_blends_exports_how_far_it_is_and_what_it_may(rig):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    rig.order(rig.command("START_GRAFTING", blending_method_index=1, blending_schedule_end=0.5))
    rig.train(5)
    state = state_of(rig)
    assert state.stage == lifecycle.BLENDING
    assert set(state.metrics) >= ALWAYS
    assert (state.metrics["alpha_steps"], state.metrics["alpha_total_steps"]) == (5.0, 20.0)
    assert state.metrics["alpha_temperature"] == 2.0
    assert BLENDING_METHODS[int(state.metrics["alpha_schedule"])] == rig.slot.schedule.method == BLENDING_METHODS[1]
    assert state.metrics["alpha"] == pytest.approx(rig.slot.site.alpha)
    assert 0.0 < state.metrics["alpha"] < 1.0
    assert (state.metrics["blend_allowed"], state.metrics["risk_tolerance"]) == (1.0, 0.5)


def test_what_is_not_known_of_a_seed_is_left_out(rig):
    state = state_of(rig)
    assert set(state.metrics) >= ALWAYS
    assert not state.HasField("gradient_norm")
    assert not state.HasField("learning_rate")
    assert "loss_since_graft" not in state.metrics


def test_a_seed_that_failed_may_not_be_blended(rig):
    rig.grow(lifecycle.TRAINING)
    rig.slot.site.failure = "raised"
    assert state_of(rig).metrics["blend_allowed"] == 0.0


def test_how_long_a_seed_is_in_its_stage_is_counted_anew_in_each(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    assert state_of(rig).metrics["steps_in_stage"] == 3.0
