"""A step that is expected is rehearsed, at the right moment and without a trace."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest
from esper_servers.tamiyo.records.memory import Memory
from esper_servers.tamiyo.turns import anticipation
from esper_servers.tamiyo.turns.anticipation import Anticipation, AnticipationConfig, Rhythm

PERIOD = 0.05


def rhythm_of(arrivals):
    rhythm = Rhythm()
    for arrival in arrivals:
        rhythm.note(arrival)
    return rhythm


@given(st.floats(anticipation.SHORTEST_REST_SECONDS, 4.0), st.lists(st.floats(-3e-4, 3e-4), min_size=60, max_size=80))
def test_of_a_regular_run_the_next_step_is_expected_no_later_than_it_comes(period, jitters):
    *before, last = [max(0.009, period) * n + jitter for n, jitter in enumerate(jitters)]
    earliest = rhythm_of(before).earliest
    assert earliest is not None
    assert last - 0.005 < earliest
    assert earliest < last + 0.0009


@pytest.mark.parametrize(
    "arrivals",
    [
        [],
        [1.0],
        [1.0, 1.05],
        [0.001 * n for n in range(100)],
        [6.0 * n for n in range(100)],
        [0.05 * n + (0.01 if n % 2 else 0) for n in range(100)],
        [*(0.05 * n for n in range(100)), 30.0],
    ],
    ids=["no step", "one step", "two steps", "back to back", "seldom", "irregular", "after a pause"],
)
def test_of_other_runs_no_step_is_expected(arrivals):
    assert rhythm_of(arrivals).earliest is None


class Loop:
    """A clock that a test moves, and a loop that calls when it is told to."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def call_later(self, delay, callback, *args):
        self.calls.append((self.now + delay, callback, args))

    def fire(self, late=0.0):
        due, callback, args = self.calls.pop(0)
        self.now = max(self.now, due + late)
        callback(*args)


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def expecting(loop):
    """An anticipation that has seen a hundred regular steps of a run, and what it rehearsed."""
    rehearsed = []

    def make(config=None, rehearse=lambda: None, steps=100):
        found = Anticipation(config, clock=lambda: loop.now, call_later=loop.call_later)
        rhythm = Rhythm()
        for _ in range(steps):
            loop.now += PERIOD
            loop.calls.clear()
            found.expect(rhythm, loop.now, lambda: (rehearsed.append(loop.now), rehearse()))
        return found, rhythm, rehearsed

    return make


def test_a_step_is_rehearsed_so_that_the_rehearsal_ends_before_it_comes(loop, expecting):
    _, _, rehearsed = expecting()
    last = loop.now
    loop.fire()
    margin = anticipation.LEAD_SECONDS + anticipation.FIRST_COST_SECONDS
    assert rehearsed == [pytest.approx(last + PERIOD - margin, abs=1e-4)]


def test_what_a_rehearsal_takes_is_learned(loop, expecting):
    def work():
        loop.now += 0.004

    found, rhythm, rehearsed = expecting(rehearse=work)
    for _ in range(40):
        arrived = rhythm.last + PERIOD
        loop.fire()
        loop.now = arrived
        found.expect(rhythm, arrived, lambda: (rehearsed.append(loop.now), work()))
    arrived = rhythm.last
    loop.fire()
    assert rehearsed[-1] == pytest.approx(arrived + PERIOD - anticipation.LEAD_SECONDS - 0.004, abs=2e-4)


def test_what_takes_too_long_is_rehearsed_no_more(loop, expecting):
    def work():
        loop.now += 1.0

    found, rhythm, rehearsed = expecting(rehearse=work)
    loop.fire()
    for _ in range(100):
        loop.now += PERIOD
        found.expect(rhythm, loop.now, lambda: rehearsed.append(loop.now))
    assert (len(rehearsed), loop.calls) == (1, [])


def test_a_step_that_came_early_is_not_rehearsed(loop, expecting):
    found, rhythm, rehearsed = expecting()
    loop.now += PERIOD / 2
    found.expect(rhythm, loop.now, lambda: rehearsed.append("next"))
    loop.fire()
    assert rehearsed == []


def test_where_others_keep_all_at_hand_nothing_is_rehearsed(loop, expecting):
    found, _, rehearsed = expecting()
    loop.now += PERIOD - 0.006
    found.expect(Rhythm(), loop.now, lambda: None)
    loop.fire()
    assert rehearsed == []


def test_a_rehearsal_that_fails_harms_nobody(loop, expecting):
    def fail():
        raise RuntimeError

    found, rhythm, rehearsed = expecting(rehearse=fail)
    loop.fire()
    loop.now = rhythm.last + PERIOD
    found.expect(rhythm, loop.now, fail)
    assert (len(rehearsed), len(loop.calls)) == (1, 1)


def test_who_wants_no_rehearsals_gets_none(loop, expecting):
    expecting(AnticipationConfig(enabled=False))
    assert loop.calls == []


@pytest.mark.parametrize("stage", [Stage.SEED_LIFECYCLE_STAGE_GERMINATED, Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED])
def test_a_rehearsal_leaves_no_trace(start, policy, stage):
    def decided(rehearses):
        controller = start(policy)
        run, told = controller.pipeline.runs.find("run"), []
        for sequence in range(1, 20):
            packet = controller.packet(stage, loss=1 / sequence, gradient_norm=sequence)
            if rehearses:
                controller.pipeline.rehearse(run, controller.request(sequence, packet))
            command = controller.ask(sequence, packet)
            record = controller.decisions.explain(command) if command else None
            told.append((bool(command), record and dict(record.evidence.memory), Memory.of(run).numbers()))
            told[-1] += tuple(array.tobytes() for array in run.graph.copy_features().values())
        return told

    assert decided(rehearses=True) == decided(rehearses=False)


async def test_every_step_and_no_epoch_tells_of_the_rhythm_of_its_run(controller, monkeypatch):
    expected, evaluated = [], []
    pipeline = controller.pipeline
    monkeypatch.setattr(pipeline._anticipation, "expect", lambda *arguments: expected.append(arguments))
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.5)
    await pipeline.evaluate_in_band(controller.request(1, packet), controller.owner)
    epoch = EvaluateEpochRequest(run_id="run", sequence=2, packet=packet).SerializeToString()
    await pipeline.evaluate_epoch(epoch, controller.owner, time.perf_counter())
    [(rhythm, _, rehearse)] = expected
    assert rhythm is pipeline.runs.find("run").rhythm
    monkeypatch.setattr(type(pipeline.queue), "has_long_turns", False)  # Whatever machine this runs on.
    monkeypatch.setattr(pipeline.policy, "evaluate", lambda inputs, *_: evaluated.append(inputs))
    rehearse()
    assert evaluated == [pipeline.runs.find("run").graph.inputs]


async def test_while_the_policy_rests_nothing_is_rehearsed(controller, monkeypatch):
    packet, pipeline = controller.packet(Stage.SEED_LIFECYCLE_STAGE_TRAINING, loss=0.5), controller.pipeline
    evaluated = []
    monkeypatch.setattr(pipeline.policy, "evaluate", lambda *_: evaluated.append("once"))
    for _ in range(10):
        pipeline.breaker.record_failure()
    pipeline.rehearse(pipeline.runs.find("run"), controller.request(1, packet))
    assert evaluated == []
