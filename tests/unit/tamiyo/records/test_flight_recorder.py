"""The flight recorder keeps the last steps of all runs within its bounds."""

from __future__ import annotations

import asyncio
import time

import pytest

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, EvaluateStepsResponse
from esper_servers.tamiyo.records.flight_recorder import OVERHEAD_BYTES, AnsweredStep, FlightRecorder

FOSSIL = Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED


def note(recorder, sequence, *, size=0):
    recorder.note("run", sequence, b"q" * size, b"", "policy-1", 0, is_epoch=False)


def sequences(recorder, noted=0):
    return [AnsweredStep._make(step).sequence for step in recorder.since(noted)]


def test_it_keeps_so_many_steps_and_lets_go_of_the_oldest():
    recorder = FlightRecorder(most_steps=3)
    for sequence in range(1, 6):
        note(recorder, sequence)
    assert sequences(recorder) == [3, 4, 5]
    assert recorder.noted == 5


def test_large_packets_leave_room_for_fewer_steps():
    recorder = FlightRecorder(most_bytes=3 * (1000 + OVERHEAD_BYTES))
    for sequence in range(1, 6):
        note(recorder, sequence, size=1000)
    assert sequences(recorder) == [3, 4, 5]
    note(recorder, 6, size=2000 + OVERHEAD_BYTES)
    assert sequences(recorder) == [5, 6]
    note(recorder, 7)
    note(recorder, 8)
    assert sequences(recorder) == [6, 7, 8]


def test_a_step_larger_than_its_bound_is_not_kept_and_spoils_nothing():
    recorder = FlightRecorder(most_bytes=1000 + OVERHEAD_BYTES)
    note(recorder, 1, size=1001)
    assert sequences(recorder) == []
    note(recorder, 2, size=1000)
    assert sequences(recorder) == [2]


@pytest.mark.parametrize(("noted", "expected"), [(0, [2, 3, 4]), (2, [3, 4]), (4, [])])
def test_it_tells_what_came_since(noted, expected):
    recorder = FlightRecorder(most_steps=3)
    for sequence in range(1, 5):
        note(recorder, sequence)
    assert sequences(recorder, noted) == expected


def test_every_answer_is_kept_as_it_left_with_its_question(controller):
    recorder, request = controller.pipeline.recorder, controller.request(1, controller.packet(FOSSIL, loss=0.5))
    before = controller.pipeline.clock_ns()
    reply = asyncio.run(controller.pipeline.evaluate_in_band(request, controller.owner))
    (step,) = map(AnsweredStep._make, recorder.since(0))
    assert (step.run_id, step.sequence, step.request, step.reply) == ("run", 1, request, reply)
    assert (step.policy_version, step.is_epoch) == (controller.policy.version, False)
    assert before <= step.answered_ns <= controller.pipeline.clock_ns()


def test_an_answer_that_is_given_again_is_kept_once_and_a_refusal_not_at_all(controller):
    request = controller.request(1, controller.packet(FOSSIL, loss=0.5))
    for asked in (request, request, controller.request(1, controller.packet(FOSSIL, loss=0.6))):
        reply = asyncio.run(controller.pipeline.evaluate_in_band(asked, controller.owner))
    assert EvaluateStepsResponse.FromString(reply).decision.HasField("error")
    assert sequences(controller.pipeline.recorder) == [1]


def test_a_decision_at_the_end_of_an_epoch_is_kept_as_such(controller):
    request = EvaluateEpochRequest(run_id="run", sequence=1, packet=controller.packet(FOSSIL, loss=0.5))
    raw = request.SerializeToString()
    asyncio.run(controller.pipeline.evaluate_epoch(raw, controller.owner, time.perf_counter()))
    (step,) = map(AnsweredStep._make, controller.pipeline.recorder.since(0))
    assert (step.request, step.is_epoch) == (raw, True)
