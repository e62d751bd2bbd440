"""A whole run with seeds, taken back by Tolaria: weights, optimizer, seeds and counters together."""

from __future__ import annotations

import pytest
import torch

from esper_rpc.errors import FailedPrecondition
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.tolaria.checkpoints.assembly import keep_checkpoints
from esper_servers.tolaria.checkpoints.schedule import CheckpointConfig
from esper_servers.tolaria.rollback.rollback import FAST, FULL, RollbackConfig

UNHURRIED = RollbackConfig(prepare_ms=60_000, commit_ms=60_000, confirm_ms=60_000, full_seconds=3600)


class Session:
    """The session of a rig, without a mesh."""

    is_connected = False

    def __init__(self, rig):
        self.rig, self.epoch = rig, 1

    @property
    def global_step(self):
        return self.rig.step_index

    @global_step.setter
    def global_step(self, step):
        self.rig.step_index = step

    def open_again(self):
        pass

    def state_dict(self):
        return {"epoch": self.epoch, "global_step": self.global_step, "host": self.rig.host.state_dict()}

    def load_state_dict(self, state):
        self.rig.host.load_state_dict(state["host"])
        self.epoch, self.global_step = state["epoch"], state["global_step"]


class Run:
    """A rig whose optimizer has moments, with checkpoints."""

    def __init__(self, rig, directory, *, is_scheduled=False):
        self.rig = rig
        rig.optimizer.param_groups[0]["momentum"] = 0.9
        self.checkpoints = keep_checkpoints(
            rig.model, rig.optimizer, session=Session(rig), host=rig.host, directory=directory,
            config=CheckpointConfig(save_every_steps=1), rollback=UNHURRIED,
        )  # fmt: skip
        if is_scheduled:
            self.checkpoints.register("scheduler", torch.optim.lr_scheduler.CosineAnnealingLR(rig.optimizer, 1000))

    def keep(self, tier):
        step = self.rig.step_index
        if tier == FAST:
            assert self.checkpoints.snapshot(epoch=1, step=step)
        else:
            self.checkpoints.save(epoch=1, step=step).result(60)

    def roll_back(self, tier):
        result = self.checkpoints.roll_back(latest_step=self.rig.step_index, reason="test", tier=tier)
        assert result.tier == tier, result
        return result

    def picture(self):
        state = self.checkpoints._state.capture()
        state.pop("random")
        return repr(flat(state))


def flat(state):
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in flat(each)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


@pytest.fixture
def make_run(make_rig, tmp_path):
    made = []

    def make(authority=OptimizerAuthority, **options):
        made.append(Run(make_rig(make_authority=authority), tmp_path / "checkpoints", **options))
        return made[-1]

    yield make
    for run in made:
        run.checkpoints.close()


def finish(rig):
    """Bring the blending seed to a fossil."""
    rig.train(21)
    for operation in ("STABILIZE", "EVALUATE", "FOSSILIZE"):
        assert rig.do(operation).result == CommandOutcome.RESULT_APPLIED
        rig.train(2)


@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("tier", [FAST, FULL])
def test_a_rollback_while_a_seed_blends_restores_weights_optimizer_and_seeds_together(make_run, tier, is_scheduled):
    run = make_run(is_scheduled=is_scheduled)
    run.rig.grow(lifecycle.BLENDING)
    run.rig.train(3)
    expected, step = run.picture(), run.rig.step_index
    assert 0 < run.rig.slot.site.alpha < 1
    run.keep(tier)
    run.rig.train(4)
    later = run.picture()
    finish(run.rig)
    assert run.rig.slot.stage == lifecycle.FOSSILIZED
    assert run.roll_back(tier).step == step
    assert run.picture() == expected
    assert run.rig.slot.stage == lifecycle.BLENDING
    run.rig.train(4)
    assert run.picture() == later


@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("tier", [FAST, FULL])
def test_a_rollback_to_before_a_cull_brings_the_seed_back(make_run, tier, is_scheduled):
    run = make_run(is_scheduled=is_scheduled)
    run.rig.grow(lifecycle.BLENDING)
    run.rig.train(2)
    run.keep(tier)
    expected = run.picture()
    run.rig.do("CULL")
    run.rig.train(2)
    run.roll_back(tier)
    assert run.picture() == expected


def test_another_process_resumes_a_fossil_and_a_blending_seed(make_run):
    first = make_run()
    first.rig.grow(lifecycle.FOSSILIZED)
    first.rig.train(2)
    first.rig.seed_id = first.rig.seed_ids[0]
    first.rig.grow(lifecycle.BLENDING)
    first.rig.train(2)
    first.keep(FULL)
    first.rig.train(3)
    second = make_run()
    assert second.checkpoints.resume().step == first.rig.step_index - 3
    second.rig.train(3)
    assert second.picture() == first.picture()


def test_a_seed_that_is_resumed_has_what_its_gates_and_its_payload_go_by(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.TRAINING)
    first.train(2)
    grafted_at = first.step_index
    assert first.do("START_GRAFTING").result == CommandOutcome.RESULT_APPLIED
    first.train(21)
    second.model.load_state_dict(first.model.state_dict())
    second.host.load_state_dict(first.host.state_dict())
    assert second.slot.updates == first.slot.updates > 20
    assert second.do("STABILIZE").result == CommandOutcome.RESULT_APPLIED
    assert second.do("CULL").result == CommandOutcome.RESULT_APPLIED
    assert dict(second.host.rollback_payload(second.seed_id).payload)["step"] == grafted_at


KNOWN = {
    "risk": 0.25, "steps_in_stage": 9, "age_epochs": 3, "updates": 7, "violations": 1, "gradient_norm": 0.5,
    "loss_at_graft": 1.5, "grafted_at": 11, "is_fine_tuning": True, "alpha_band": 1, "fallback_used": True,
    "blueprint_id": "residual_mlp",
}  # fmt: skip


def test_all_that_is_known_of_a_seed_is_known_after_a_resume(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.PROBATIONARY)
    for name, value in KNOWN.items():
        setattr(first.slot, name, value)
    second.host.load_state_dict(first.host.state_dict())
    assert {name: getattr(second.slot, name) for name in KNOWN} == KNOWN


def test_a_seed_that_is_resumed_on_probation_is_judged_by_the_loss_before_its_graft(make_rig):
    first, second = make_rig(), make_rig()
    first.grow(lifecycle.PROBATIONARY)
    first.train()
    second.model.load_state_dict(first.model.state_dict())
    second.host.load_state_dict(first.host.state_dict())
    for step in range(50):
        second.host.observe(1e3, step)
    assert second.do("FOSSILIZE").reason == "g4_system_impact"


def test_a_seed_that_cannot_be_built_any_more_stands_in_the_way_and_nothing_changes(make_run, monkeypatch):
    run = make_run()
    run.rig.grow(lifecycle.TRAINING)
    run.keep(FAST)
    run.rig.train(2)
    before = run.picture()
    monkeypatch.setattr(run.rig.host._checkpoint, "_factories", {})
    result = run.checkpoints.roll_back(latest_step=run.rig.step_index, reason="test")
    assert result.failures[0][:3] == ("fast", "prepare", "refused")
    assert "cannot be built" in result.failures[0].detail
    assert (result.needs_halt, result.has_changed) == (True, False)
    assert run.picture() == before


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "advice"),
    [
        (OptimizerAuthority, UnifiedLRController, "attach without one"),
        (UnifiedLRController, OptimizerAuthority, "attach with one that is made alike"),
    ],
)
def test_a_run_under_another_hand_on_its_learning_rates_is_not_resumed_and_nothing_changes(
    make_run, saved_by, resumed_by, advice
):
    first = make_run(saved_by)
    first.rig.grow(lifecycle.BLENDING)
    first.keep(FULL)
    state = first.rig.host.state_dict()
    second = make_run(resumed_by)
    second.rig.train(2)
    before = second.picture()
    with pytest.raises(FailedPrecondition, match=advice):
        second.checkpoints.resume()
    with pytest.raises(FailedPrecondition, match=advice):
        second.rig.host.load_state_dict(state)
    assert second.picture() == before
