from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from torch import nn

from esper_client.halt import HaltSwitch
from esper_rpc.errors import DataLoss, NotFound
from esper_rpc.proto.tolaria.v1 import Checkpoint
from esper_servers.tolaria.checkpoint_keeper import RolledBack
from esper_servers.tolaria.emergency_levels import CONSERVATIVE, ELEVATED, HALT, NONE, NOTICE
from esper_servers.tolaria.escalation import FAST, FULL, EmergencyConfig
from esper_servers.tolaria.trainer import Trainer

PATIENCE_SECONDS = 30


class Session:
    """What a trainer needs of a session, where a mesh never answers anything."""

    def __init__(self, halt):
        self.halt, self.global_step, self.epoch = halt, 0, 0
        self.apply_ms = self.finalize_ms = 0.0
        self.told = []

    def step(self, loss, **what):
        self.global_step += 1
        self.told.append((loss, what))
        return []

    def start_epoch(self, epoch):
        self.epoch = epoch


class Keeper:
    """Keeps one state of a model and its optimizer, in memory and, as it says, on the disk."""

    def __init__(self, model, optimizer):
        self.parts, self.kept, self.rollbacks = (model, optimizer), None, []
        self.seconds, self.broken = 0.1, {}

    def checkpoints(self):
        return [Checkpoint(name="c")] if self.kept else []

    def create_checkpoint(self, _reason):
        self.kept = [copy.deepcopy(part.state_dict()) for part in self.parts]
        return Checkpoint(name="c")

    def rollback(self, _checkpoint, tier, reason):
        self.rollbacks.append((tier, reason))
        if self.kept is None:
            raise NotFound("There is no checkpoint.")
        if tier in self.broken:
            raise self.broken[tier]
        for part, state in zip(self.parts, self.kept, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        return RolledBack(Checkpoint(name="c"), tier, self.seconds)


class Loop:
    """A training loop of a user, with a trainer or without."""

    def __init__(self, ward=None):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.x, self.y = torch.randn(8, 4), torch.randint(0, 2, (8,))
        self.keeper = Keeper(self.model, self.optimizer)
        self.scale = 1.0
        self.ward, self.trainer = ward, None
        if ward is not None:
            self.session = Session(ward.halt)
            self.trainer = Trainer(
                session=self.session, optimizer=self.optimizer, emergencies=ward.emergencies, mode=ward.mode,
                checkpoints=self.keeper,
            )  # fmt: skip

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            if self.trainer is not None:
                self.trainer.step(loss * self.scale, samples=8, gradient_norm=1.0)

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def loop(ward):
    return Loop(ward)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_the_trainer_has_the_same_bits_as_one_without(loop):
    plain = Loop()
    plain.step(30)
    loop.step(30)
    loop.trainer.end_epoch(accuracy=0.5)
    assert same(plain.weights(), loop.weights())


def test_a_step_tells_the_session_what_was_measured(loop):
    loop.step(3)
    loss, what = loop.session.told[-1]
    assert (what["samples"], what["gradient_norm"]) == (8, 1.0)
    assert what["metrics"]["optimizer_lr"] == 0.1
    assert what["metrics"]["loss_delta"] < 0
    assert isinstance(loss, float)


def test_in_conservative_mode_a_step_tells_no_more_than_it_must(loop, ward):
    ward.mode.enter("emergency")
    loop.step()
    assert loop.session.told[-1][1]["metrics"] == {}


def test_a_run_that_is_halted_in_a_step_changes_no_parameter_until_it_is_released(loop, ward):
    loop.step(2)
    before, changes = loop.weights(), []
    loop.trainer.on_halt(lambda is_halted, reason: changes.append((is_halted, reason)))
    standing = threading.Event()
    ward.halt.meanwhile(standing.set)
    # In the backward pass of a step, before its update.
    loop.model.weight.register_post_accumulate_grad_hook(lambda _: ward.emergencies.alarm(HALT, "stop"))
    thread = threading.Thread(target=loop.step)
    thread.start()
    assert standing.wait(PATIENCE_SECONDS)
    assert loop.trainer.is_halted
    assert same(before, loop.weights())
    assert len(loop.session.told) == 2
    loop.trainer.release("well")
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not same(before, loop.weights())
    assert changes == [(True, "stop"), (False, "well")]


def test_work_is_done_for_others_while_the_training_stands_still(loop, ward):
    done = threading.Event()
    ward.halt.meanwhile(done.set)
    ward.emergencies.alarm(HALT, "stop")
    thread = threading.Thread(target=loop.step)
    thread.start()
    assert done.wait(PATIENCE_SECONDS)
    loop.trainer.release("well")
    thread.join(PATIENCE_SECONDS)


def test_holding_has_an_end_if_it_is_wanted(ward):
    switch = HaltSwitch()
    assert switch.hold(0)
    switch.engage("stop")
    assert not switch.hold(0.01)


def test_a_loss_that_explodes_returns_the_run_to_its_checkpoint_and_makes_it_conservative(loop, ward):
    loop.step(12)
    kept = loop.weights()
    loop.keeper.create_checkpoint("")
    loop.scale = 1000.0
    loop.step()
    assert loop.keeper.rollbacks == [(FAST, "loss_exploded")]
    assert same(kept, loop.weights())
    assert (ward.emergencies.level, ward.mode.is_active, loop.trainer.is_halted) == (CONSERVATIVE, True, False)


def test_a_fast_rollback_that_cannot_be_done_becomes_a_full_one(loop, ward):
    loop.keeper.create_checkpoint("")
    loop.keeper.broken = {FAST: DataLoss("torn")}
    loop.scale = math.nan
    loop.step()
    assert loop.keeper.rollbacks == [(FAST, "loss_not_finite"), (FULL, "rollback_failed")]
    assert ward.emergencies.level == CONSERVATIVE


@pytest.mark.parametrize(("seconds", "broken"), [(13.0, [FAST]), (0.1, [FAST, FULL])], ids=["late", "fails"])
def test_a_full_rollback_that_fails_or_is_late_halts_the_run(loop, ward, seconds, broken):
    loop.keeper.create_checkpoint("")
    loop.keeper.broken = dict.fromkeys(broken, DataLoss("torn"))
    loop.keeper.seconds = seconds
    loop.scale = math.nan
    thread = threading.Thread(target=loop.step)
    halted = threading.Event()
    loop.trainer.on_halt(lambda *_: halted.set())
    thread.start()
    assert halted.wait(PATIENCE_SECONDS)
    assert ward.emergencies.level == HALT
    loop.trainer.release("seen")
    thread.join(PATIENCE_SECONDS)


def test_epochs_that_fail_in_a_row_halt_the_run(make_ward):
    ward = make_ward(config=EmergencyConfig(failed_epochs=2))
    loop = Loop(ward)
    loop.trainer.end_epoch(failed=True)
    assert ward.emergencies.level == NONE
    thread = threading.Thread(target=loop.trainer.end_epoch, kwargs={"failed": True})
    halted = threading.Event()
    loop.trainer.on_halt(lambda *_: halted.set())
    thread.start()
    assert halted.wait(PATIENCE_SECONDS)
    assert ward.halt.reason == "epochs_failed"
    loop.trainer.release("seen")
    thread.join(PATIENCE_SECONDS)


def test_before_the_first_checkpoint_there_is_nothing_to_return_to_and_the_run_goes_on(loop, ward):
    loop.scale = math.nan
    loop.step()
    assert ward.emergencies.level == CONSERVATIVE


def test_an_epoch_with_a_loss_that_is_no_number_has_failed(loop):
    loop.scale = math.nan
    loop.step()
    loop.trainer.end_epoch()
    assert loop.trainer.guard.breaker.consecutive_failures == 1
    assert loop.session.epoch == 1


def test_an_accuracy_that_collapses_rolls_back_from_disk(loop, ward):
    loop.keeper.create_checkpoint("")
    loop.trainer.end_epoch(accuracy=0.9)
    loop.trainer.end_epoch(accuracy=0.1)
    assert loop.keeper.rollbacks == [(FULL, "accuracy_collapsed")]
    assert ward.emergencies.level == ELEVATED


def test_good_epochs_end_what_the_trainer_raised_by_itself(loop, ward):
    loop.scale = math.nan
    loop.keeper.create_checkpoint("")
    loop.step()
    loop.trainer.end_epoch()
    loop.scale = 1.0
    for _ in range(3):
        assert ward.emergencies.level == CONSERVATIVE
        loop.step()
        loop.trainer.end_epoch()
    assert (ward.emergencies.level, ward.emergencies.in_force[0].reason) == (NOTICE, "calm")


def test_good_epochs_do_not_end_what_an_operator_raised(loop, ward):
    ward.signal(CONSERVATIVE)
    for _ in range(5):
        loop.trainer.end_epoch()
    assert ward.emergencies.level == CONSERVATIVE


def test_a_seed_host_that_takes_too_long_is_told_once_in_fifty_steps(loop, told):
    loop.session.apply_ms = 6.0
    loop.step(51)
    late = [attributes for name, attributes in told if name == "tolaria.kasmina_timeout"]
    assert [found["step_index"] for found in late] == ["1", "51"]
    assert (late[0]["budget_ms"], late[0]["spent_ms"], late[0]["priority"]) == ("5.0", "6.0", "NORMAL")


def test_a_fault_of_ours_does_not_reach_the_loop(loop, monkeypatch):
    monkeypatch.setattr(loop.trainer.metrics, "collect", lambda *_, **__: 1 / 0)
    loop.step(2)
    assert len(loop.session.told) == 2
