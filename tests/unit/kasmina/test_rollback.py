from __future__ import annotations

import copy

import pytest
import torch

from esper_rpc import verdict
from esper_rpc.proto.leyline.v1 import CommandOutcome, CommandType
from esper_servers.kasmina import lifecycle

STAGES = [
    lifecycle.DORMANT, lifecycle.GERMINATED, lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.SHADOWING,
    lifecycle.PROBATIONARY, lifecycle.FOSSILIZED,
]  # fmt: skip


def make(make_rig, *, is_scheduled=False):
    rig = make_rig()
    rig.optimizer.param_groups[0]["momentum"] = 0.9
    if is_scheduled:
        torch.optim.lr_scheduler.StepLR(rig.optimizer, 1000)
    return rig


def save(rig):
    return copy.deepcopy((rig.model.state_dict(), rig.host.state_dict(), rig.optimizer.state_dict(), rig.step_index))


def roll_back(rig, saved):
    model, host, optimizer, step_index = copy.deepcopy(saved)
    rig.host.roll_back(host)
    rig.model.load_state_dict(model)
    rig.optimizer.load_state_dict(optimizer)
    rig.step_index = step_index


def flat(state):
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in flat(each)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


def assert_same(one, other):
    # As text, for what is not a number is not equal to itself.
    assert repr(flat(save(one))) == repr(flat(save(other)))


def grow(rig, stage):
    if stage != lifecycle.DORMANT:
        rig.grow(stage)
    rig.train(2)


def finish(rig):
    """Bring the seed from wherever it is to a fossil."""
    operations = ["START_TRAINING", "START_GRAFTING", "STABILIZE", "EVALUATE", "FOSSILIZE"]
    for operation in operations[max(0, rig.slot.stage - lifecycle.GERMINATED) :]:
        rig.train(21 if rig.slot.stage == lifecycle.BLENDING else 2)
        if rig.slot.stage != lifecycle.DORMANT:
            assert rig.do(operation).result == CommandOutcome.RESULT_APPLIED


def fossilise(rig, number):
    rig.seed_id = rig.seed_ids[number]
    rig.slot = rig.host.seeds[rig.seed_id]
    rig.grow(lifecycle.FOSSILIZED)
    rig.train(2)


@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_rolled_back_goes_on_as_if_nothing_had_been_between(make_rig, stage, is_scheduled):
    rig = make(make_rig, is_scheduled=is_scheduled)
    grow(rig, stage)
    saved = save(rig)
    other = make(make_rig, is_scheduled=is_scheduled)
    roll_back(other, saved)
    finish(rig)
    fossilise(rig, 0)
    roll_back(rig, saved)
    assert_same(rig, other)
    rig.train(5)
    other.train(5)
    assert_same(rig, other)


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_fossils_come_back_in_the_order_in_which_they_joined_the_optimizer(make_rig, is_scheduled):
    rig = make(make_rig, is_scheduled=is_scheduled)
    fossilise(rig, 1)
    fossilise(rig, 0)
    saved = save(rig)
    rig.train(3)
    expected = save(rig)
    roll_back(rig, saved)
    rig.train(3)
    assert repr(flat(save(rig))) == repr(flat(expected))
    fresh = make(make_rig, is_scheduled=is_scheduled)
    roll_back(fresh, saved)
    fresh.train(3)
    assert_same(rig, fresh)


def test_of_what_was_decided_before_a_rollback_nothing_is_carried_out_after_it(rig):
    rig.grow(lifecycle.TRAINING)
    rig.train(2)
    saved, epoch = save(rig), rig.host.receiver_epoch
    waiting, late = rig.command("CULL"), rig.envelope(rig.command("CULL"))
    rig.host.submit(rig.envelope(waiting, sequence=rig.sequence + 1))
    roll_back(rig, saved)
    outcomes = rig.host.apply_pending()
    assert [(o.command_id, o.result, o.reason) for o in outcomes] == [
        (waiting.command_id, CommandOutcome.RESULT_FAILED, "rolled_back")
    ]
    assert rig.host.submit(late).reason == "wrong_epoch"
    assert rig.slot.stage == lifecycle.TRAINING
    assert rig.host.receiver_epoch != epoch
    assert rig.do("START_GRAFTING").result == CommandOutcome.RESULT_APPLIED


def test_commands_of_a_type_may_be_carried_out_elsewhere_at_once_or_later(rig):
    command = rig.command(seed_id="")
    command.command_type = CommandType.COMMAND_TYPE_ROLLBACK
    assert rig.order(command).reason == "unsupported"
    verdicts = [None, None, verdict.APPLIED]
    rig.host.route(CommandType.COMMAND_TYPE_ROLLBACK, lambda _: verdicts.pop(0))
    command.command_id = rig.command().command_id
    rig.host.submit(rig.envelope(command))
    assert rig.host.apply_pending() == []
    # What is put off survives the rollback that it asks for.
    rig.host.roll_back(rig.host.state_dict())
    assert rig.host.apply_pending() == []
    assert [outcome.result for outcome in rig.host.apply_pending()] == [CommandOutcome.RESULT_APPLIED]


def test_a_state_is_checked_without_a_change(rig, unchanged):
    rig.grow(lifecycle.BLENDING)
    state, before = rig.host.state_dict(), rig.picture()
    rig.host.check_state(state)
    unchanged(before, rig.picture())
