"""Commands that come too late for the trainer: the run is left alone for a while."""

from __future__ import annotations

import math
import pickle

import pytest

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, EvaluateStepsResponse, Step
from esper_servers.tamiyo.command_rest import CommandRest, Marks

GERMINATED, DORMANT = Stage.SEED_LIFECYCLE_STAGE_GERMINATED, Stage.SEED_LIFECYCLE_STAGE_DORMANT
BEFORE = Marks(germinated_at=1, optimizer_at=2, paused_at=3, adjusted=False)
LATE = [CommandOutcome(command_id="c", result=CommandOutcome.RESULT_LATE)]
STALE = [CommandOutcome(command_id="c", result=CommandOutcome.RESULT_REJECTED, reason="stale_command")]
SILENT = []
OF_ANOTHER = [CommandOutcome(command_id="other", result=CommandOutcome.RESULT_APPLIED)]
MISSED = [CommandOutcome(result=CommandOutcome.RESULT_LOCAL_FALLBACK, reason="deadline_missed")]
ARRIVED = ["RESULT_APPLIED", "RESULT_QUEUED", "RESULT_REJECTED", "RESULT_FAILED"]


@pytest.fixture
def rest():
    return CommandRest()


def tell(rest, outcomes, step=10, longest=50):
    rest.note_issued("c", BEFORE)
    return rest.hear(outcomes, step=step, longest=longest)


@pytest.mark.parametrize("outcomes", [LATE, STALE, MISSED, OF_ANOTHER + MISSED])
def test_a_command_that_came_late_has_not_happened(rest, outcomes):
    assert tell(rest, outcomes) == BEFORE
    assert (rest.late, rest.until) == (1, 12)


@pytest.mark.parametrize("result", ARRIVED)
def test_one_that_came_whatever_became_of_it_ends_the_row(rest, result):
    tell(rest, LATE)
    assert tell(rest, [CommandOutcome(command_id="c", result=CommandOutcome.Result.Value(result))], step=20) is None
    assert (rest.late, rest.until) == (0, 12)


def test_a_rest_doubles_with_each_late_command_up_to_a_limit(rest):
    rests = []
    for step in range(0, 10_000, 100):
        tell(rest, LATE, step=step)
        rests.append(rest.until - step)
    assert rests[:4] == [2, 4, 8, 8]
    assert set(rests[2:]) == {8}


@pytest.mark.parametrize("outcomes", [SILENT, OF_ANOTHER])
def test_a_trainer_that_says_nothing_yet_is_not_late(rest, outcomes):
    assert tell(rest, outcomes) is None
    assert rest.hear(LATE, step=11, longest=50) == BEFORE
    assert (rest.late, rest.until) == (1, 13)


def test_one_that_came_in_time_is_not_late_for_a_step_that_had_no_answer(rest):
    assert tell(rest, [*MISSED, CommandOutcome(command_id="c", result=CommandOutcome.RESULT_QUEUED)]) is None
    assert rest.late == 0


def test_nothing_is_heard_of_a_command_twice(rest):
    tell(rest, MISSED)
    assert rest.hear(LATE, step=11, longest=50) is None
    assert (rest.late, rest.until) == (1, 12)


class Trainer:
    """Takes steps of a controller, and is late for each command or for none."""

    def __init__(self, controller, stage=GERMINATED):
        self.controller = controller
        self.stage = stage
        self.is_late = True
        self.commands = {}
        self._told = []
        self._late = ""

    def step(self, *, loss=0.5):
        """Take a step; returns its reason."""
        sequence = self.controller.pipeline.runs.find("run").last_sequence + 1
        metrics = {"loss": loss, "gradient_norm": 0.9, "samples_per_s": 4000.0, "hook_latency_ms": 1.5}
        packet = self.controller.packet(self.stage, **metrics)
        step = Step(run_id="run", sequence=sequence, budget_us=5_000_000, packet=packet, outcomes=self._told)
        command_id = self.controller.send(EvaluateStepRequest(step=step))
        # What came late is told a step later than what came in time.
        late, self._late = self._late, ""
        self._told = [CommandOutcome(command_id=late, result=CommandOutcome.RESULT_LATE)] if late else []
        if command_id:
            self.commands[sequence] = command_id
            if self.is_late:
                self._late = command_id
                self._told += MISSED
            else:
                self._told.append(CommandOutcome(command_id=command_id, result=CommandOutcome.RESULT_QUEUED))
        return EvaluateStepsResponse.FromString(self.run.last_reply).decision.no_action.reason

    @property
    def run(self):
        return self.controller.pipeline.runs.find("run")


def test_a_trainer_that_is_late_is_asked_less_and_less_and_at_once_again_when_it_no_longer_is(controller):
    trainer = Trainer(controller)
    reasons = [trainer.step() for _ in range(40)]
    assert list(trainer.commands) == [1, 4, 9, 18, 27, 36]
    assert reasons.count("late_commands") == 34
    trainer.is_late = False
    while len(trainer.commands) < 9:
        trainer.step()
    first, second, third = list(trainer.commands)[-3:]
    assert third - second == second - first == 1


def test_a_late_germination_does_not_count_as_one(controller):
    trainer = Trainer(controller, stage=DORMANT)
    while not trainer.commands:
        trainer.step()
    (first,) = trainer.commands
    while len(trainer.commands) < 2:
        trainer.step()
    assert list(trainer.commands)[1] == first + 3


def test_a_pause_that_came_late_is_asked_for_again_sooner_than_one_that_was_held(controller):
    trainer = Trainer(controller)
    for _ in range(8):
        trainer.step(loss=math.nan)
    assert list(trainer.commands) == [1, 4]


def test_decisions_of_a_run_that_rests_are_replayed_bit_for_bit(controller):
    trainer = Trainer(controller)
    for _ in range(100):
        trainer.step()
    controller.decisions.flush()
    sampled = controller.decisions.explain("run/100")
    assert sampled.reason == "late_commands"
    assert sampled.evidence.memory["rest.until"] > 100
    keys = [*trainer.commands.values(), "run/100"]
    assert [controller.replay.differences(key) for key in keys] == [[]] * len(keys)


def test_a_run_that_never_rested_is_recorded_as_before(controller):
    command_id = Trainer(controller).step() or controller.last_command
    assert not [name for name in controller.decisions.explain(command_id).evidence.memory if name.startswith("rest.")]


def test_a_rest_can_cross_between_processes(rest):
    tell(rest, LATE)
    rest.note_issued("d", BEFORE)
    crossed = pickle.loads(pickle.dumps(rest))
    assert crossed.hear(MISSED, step=20, longest=50) == BEFORE
    assert (crossed.late, crossed.until) == (2, 24)
