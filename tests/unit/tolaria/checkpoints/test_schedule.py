from __future__ import annotations

import uuid
from concurrent.futures import Future

import pytest

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType, EmergencyLevel
from esper_rpc.verdict import Verdict
from esper_servers.tolaria.checkpoints.schedule import CheckpointConfig, CheckpointSchedule
from esper_servers.tolaria.checkpoints.step_end import StepEnd
from esper_servers.tolaria.rollback.rollback import RollbackResult

REJECTED, APPLIED = CommandOutcome.RESULT_REJECTED, CommandOutcome.RESULT_APPLIED


class Run:
    """A session and what keeps its checkpoints, as far as a schedule knows them."""

    def __init__(self):
        self.epoch, self.global_step = 0, 0
        self.step_end, self.is_writing = StepEnd(), False
        self.made, self.asked, self.tier = [], [], "fast"

    def snapshot(self, *, epoch, step):
        self.made.append(("memory", epoch, step))

    def save(self, *, epoch, step):
        self.made.append(("disk", epoch, step))
        return Future()

    def roll_back(self, **asked):
        self.asked.append(asked)
        return RollbackResult(reason=asked["reason"], severity=asked["severity"], tier=self.tier)


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def make(run):
    def make_schedule(limit=2, **config):
        return CheckpointSchedule(run, run, CheckpointConfig(**config), rollbacks_per_epoch=limit)

    return make_schedule


def train(schedule, run, steps):
    for _ in range(steps):
        run.global_step += 1
        schedule.end_step()


def command(**payload):
    made = AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_ROLLBACK)
    made.rollback_payload.update(payload)
    return made


def test_checkpoints_are_made_when_they_are_due(make, run):
    train(make(snapshot_every_steps=2, save_every_steps=4), run, 9)
    assert run.made == [("memory", 0, 2), ("disk", 0, 4), ("memory", 0, 6), ("disk", 0, 8)]


def test_without_a_setting_none_is_made(make, run):
    train(make(), run, 9)
    assert run.made == []


def test_while_one_is_being_written_the_next_stays_in_memory(make, run):
    run.is_writing = True
    train(make(snapshot_every_steps=2, save_every_steps=2), run, 4)
    assert run.made == [("memory", 0, 2), ("memory", 0, 4)]


def test_a_rollback_is_done_when_the_step_has_ended_and_told_in_the_next(make, run):
    schedule, asked = make(snapshot_every_steps=1), command(reason="loss_spike")
    run.global_step = 7
    assert schedule.carry_out(asked) is None
    assert schedule.carry_out(asked) is None
    assert run.asked == []
    schedule.end_step()
    assert run.asked == [
        {"latest_step": 7, "reason": "loss_spike", "severity": EmergencyLevel.EMERGENCY_LEVEL_ELEVATED, "tier": "fast"}
    ]
    assert run.made == []
    assert schedule.carry_out(asked) == Verdict(APPLIED, "fast")
    schedule.end_step()
    assert len(run.asked) == 1


def test_a_rollback_that_fails_is_a_command_that_failed(make, run):
    schedule, asked = make(), command()
    run.tier = ""
    schedule.carry_out(asked)
    schedule.end_step()
    assert schedule.carry_out(asked) == Verdict(CommandOutcome.RESULT_FAILED, "rollback_failed")


@pytest.mark.parametrize(
    ("payload", "asked"),
    [
        ({}, (7, "commanded", "fast")), ({"step": 5}, (5, "commanded", "fast")), ({"step": 0}, (0, "commanded", "fast")),
        ({"step": 99}, (7, "commanded", "fast")), ({"tier": "full"}, (7, "commanded", "full")),
    ],
)  # fmt: skip
def test_a_command_says_how_far_and_from_where(make, run, payload, asked):
    schedule, run.global_step = make(), 7
    schedule.carry_out(command(**payload))
    schedule.end_step()
    assert (run.asked[0]["latest_step"], run.asked[0]["reason"], run.asked[0]["tier"]) == asked


@pytest.mark.parametrize(
    "payload",
    [
        {"step": "5"}, {"step": -1}, {"step": float("nan")}, {"step": float("inf")}, {"step": True}, {"step": None},
        {"step": [1]}, {"tier": "slow"}, {"tier": 1}, {"tier": {}}, {"reason": 3}, {"reason": "x" * 257}, {"stop": 5},
    ],
)  # fmt: skip
def test_a_payload_that_cannot_be_meant_is_refused(make, run, payload):
    schedule = make()
    assert schedule.carry_out(command(**payload)) == Verdict(REJECTED, "malformed_payload")
    schedule.end_step()
    assert run.asked == []


def test_the_mesh_has_so_many_rollbacks_an_epoch(make, run):
    schedule = make(limit=2)
    for epoch in (3, 4):
        run.epoch = epoch
        assert [schedule.carry_out(command()) for _ in range(3)] == [None, None, Verdict(REJECTED, "local_limit")]
        schedule.end_step()
    run.epoch = 3
    assert schedule.carry_out(command()) == Verdict(REJECTED, "local_limit")
    assert len(run.asked) == 4


def test_what_other_threads_asked_for_is_done_first(make, run):
    schedule = make(snapshot_every_steps=1)
    done = run.step_end.submit(lambda: run.snapshot(epoch=9, step=9))
    train(schedule, run, 2)
    assert done.done()
    assert run.made == [("memory", 9, 9), ("memory", 0, 2)]
