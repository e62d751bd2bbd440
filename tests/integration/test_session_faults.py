"""The sentence we sell, as tests: a session whose mesh is slow, hung, dead, restarting or lying."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid

import pytest
from prometheus_client import REGISTRY

from esper_client import LoopThread, OutOfStep, RunDescription, SessionConfig, TrainingSession
from esper_rpc.errors import ResourceExhausted
from esper_rpc.proto.leyline.v1 import (
    AdaptationCommand,
    CommandOutcome,
    CommandType,
    MetricPoint,
    SignedEnvelope,
    TelemetryPacket,
)
from esper_rpc.proto.tamiyo.v1 import StepDecision
from esper_rpc.testing import TAMIYO, FakeTamiyo, serving


class RecordingHost:
    """A seed host without seeds."""

    receiver_epoch = bytes(range(16))
    last_sequence = 0

    def __init__(self):
        self.envelopes = []

    def describe(self):
        return RunDescription((), (), b"{}")

    def submit(self, envelope, *, expected_sequence=None, request_digest=None):
        self.envelopes.append((envelope, expected_sequence, request_digest))
        return CommandOutcome(command_id=envelope.nonce, result=CommandOutcome.RESULT_QUEUED)

    def observe(self, loss, global_step):
        pass

    def apply_pending(self):
        return []

    def advance_alphas(self):
        pass

    def finalize_step(self, step_index):
        return []

    def export_seed_states(self):
        return []

    def update_epoch(self, epoch):
        pass

    def set_clock_offset(self, offset_ns):
        pass

    def close(self):
        pass


class Server:
    """A fake Tamiyo on a thread of its own, which can be stopped and started at the same port."""

    def __init__(self, mesh, fake):
        self.mesh, self.fake = mesh, fake
        self.address = "127.0.0.1:0"
        self.thread = LoopThread("fake-tamiyo")
        self.start()

    def start(self):
        started, self.stopped = threading.Event(), None

        async def run():
            self.stopped = asyncio.Event()
            identity = self.mesh.identity("tamiyo")
            async with serving(
                identity, (TAMIYO, self.fake), raw_methods=FakeTamiyo.RAW_METHODS, address=self.address
            ) as server:
                self.address = server.address
                started.set()
                await self.stopped.wait()
            self.ended.set()

        self.ended = threading.Event()
        self.thread.spawn(run())
        assert started.wait(20)

    def stop(self):
        self.thread.loop.call_soon_threadsafe(self.stopped.set)
        assert self.ended.wait(20)


@pytest.fixture
def fake(mesh):
    return FakeTamiyo(mesh.keyring("tamiyo"))


@pytest.fixture
def server(mesh, fake):
    running = Server(mesh, fake)
    yield running
    if not running.ended.is_set():
        running.stop()
    running.thread.stop()


@pytest.fixture
def session(mesh, server):
    with TrainingSession(
        host=RecordingHost(), identity=mesh.identity("trainer"), tamiyo_address=server.address, run_id="run",
        config=SessionConfig(step_budget_ms=50),
    ) as running:  # fmt: skip
        yield running


def step_until(session, condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not reached: {session.reasons}"
        session.step(0.5)
        time.sleep(0.001)


def pause(_step):
    return AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_PAUSE)


def test_decisions_arrive_bound_to_the_request(session, fake):
    fake.decide = pause
    step_until(session, lambda: session.host.envelopes)
    envelope, sequence, digest = session.host.envelopes[0]
    assert (envelope.sequence, envelope.request_digest) == (sequence, digest)
    assert envelope.receiver_epoch == session.host.receiver_epoch


def test_outcomes_are_sent_until_they_are_acknowledged(session, fake):
    fake.decide = pause
    step_until(session, lambda: len(session.host.envelopes) > 2)
    sent = [o.command_id for step in fake.steps for o in step.outcomes if o.command_id]
    assert sent[0] == session.host.envelopes[0][0].nonce
    assert len(sent) == len(set(sent))


def test_a_step_tells_the_four_metrics_of_the_loop(session, fake):
    step_until(session, lambda: session.reasons["nominal"])
    answered, begun = len(fake.steps), time.monotonic()
    session.step(0.5)
    session.step(0.25, samples=32, gradient_norm=1.5)
    least = 32 / (time.monotonic() - begun)
    step_until(session, lambda: len(fake.steps) > answered + 1)
    told = fake.steps[answered + 1].packet.training_metrics
    assert (told["loss"], told["gradient_norm"]) == (0.25, 1.5)
    assert told["samples_per_s"] >= least
    assert told["hook_latency_ms"] > 0
    # Of the step before; one that could not be asked has none.
    assert told["tamiyo_latency_ms"] > 0
    assert "tamiyo_latency_ms" not in fake.steps[0].packet.training_metrics


def test_a_slow_controller_costs_the_budget_and_its_late_answer_is_fenced(session, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    gate = asyncio.Event()
    fake.decide, fake.before_answer = pause, lambda _step: gate.wait()
    missed = session.guard.misses
    step_until(session, lambda: session.guard.misses > missed)
    assert session.host.envelopes == []
    fake.before_answer = None
    gate._loop.call_soon_threadsafe(gate.set)  # The event belongs to the server's loop.
    step_until(session, lambda: session.guard.late_answers > 0)
    assert all(envelope.sequence == sequence for envelope, sequence, _ in session.host.envelopes)


def test_a_command_that_came_late_is_told_as_late_until_a_step_that_told_it_was_answered(session, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    gate, held = asyncio.Event(), []

    def hold(step):
        held.append(step.sequence)
        return gate.wait()

    fake.before_answer, fake.decide = hold, lambda step: pause(step) if step.sequence in held else None
    step_until(session, lambda: session.guard.misses > 0)
    fake.before_answer = None
    gate._loop.call_soon_threadsafe(gate.set)  # The event belongs to the server's loop.
    step_until(session, lambda: any(o.result == CommandOutcome.RESULT_LATE for o in session.outcomes))
    step_until(session, lambda: not session._questions.untold)
    session.step(0.5)

    late = [o for o in session.outcomes if o.result == CommandOutcome.RESULT_LATE]
    told = [o for step in fake.steps for o in step.outcomes if o.result == CommandOutcome.RESULT_LATE]
    assert [o.command_id for o in told] == [o.command_id for o in late]
    assert len({o.command_id for o in told}) == len(told)
    assert session.host.envelopes == []
    assert not fake.steps[-1].outcomes


def test_a_second_copy_of_an_answer_in_time_is_no_late_command(session, fake):
    fake.decide = pause
    step_until(session, lambda: session.host.envelopes)
    envelope, sequence, _ = session.host.envelopes[0]
    exchange, late = session._exchange, session.guard.late_answers
    exchange.take(StepDecision(sequence=sequence, command=envelope))
    assert session.guard.late_answers == late + 1
    assert exchange.take_late_commands() == []


def test_ids_of_late_commands_are_bounded_in_number_and_length(session):
    for number in range(1000):
        session._exchange.take(StepDecision(sequence=10**6, command=SignedEnvelope(nonce=f"{number}" + 200 * "x")))
    kept = session._exchange.take_late_commands()
    assert len(kept) == 64
    assert {len(command_id) for command_id in kept} == {128}


def test_steps_without_an_answer_are_told_as_one_local_fallback(session, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    gate = asyncio.Event()
    fake.before_answer = lambda _step: gate.wait()
    step_until(session, lambda: session.guard.misses > 2)
    fake.before_answer, answered = None, session.reasons["nominal"]
    gate._loop.call_soon_threadsafe(gate.set)
    step_until(session, lambda: session.reasons["nominal"] > answered)

    told = [step.outcomes for step in fake.steps if step.outcomes]
    assert {len(outcomes) for outcomes in told} == {1}
    last = told[-1][0]
    assert (last.result, last.command_id) == (CommandOutcome.RESULT_LOCAL_FALLBACK, "")
    assert last.reason in ("deadline_missed", "breaker_open")


def test_a_hung_controller_opens_the_breaker_and_steps_stop_waiting(session, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    fake.before_answer = lambda _step: asyncio.Event().wait()
    step_until(session, lambda: session.reasons["breaker_open"] > 10)
    assert session.guard.misses < 100


def test_a_killed_controller_is_survived_and_found_again(session, server):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    server.stop()
    step_until(session, lambda: session.reasons["mesh_unreachable"] > 20)
    seen = session.reasons["nominal"]
    server.start()
    back = time.monotonic()
    step_until(session, lambda: session.reasons["nominal"] > seen + 3, seconds=10)
    assert time.monotonic() - back < 10


def test_a_controller_that_goes_away_is_left_without_a_missed_step(session, server, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    server.thread.loop.call_soon_threadsafe(fake.begin_drain)
    opened = session.streams_opened
    step_until(session, lambda: session.streams_opened > opened)
    last = len(fake.steps)
    step_until(session, lambda: len(fake.steps) > last + 20)
    assert set(session.reasons) <= {"mesh_unreachable", "nominal"}
    assert session.guard.misses == 0


def test_a_controller_of_the_older_protocol_decides_too_and_may_drain(session, server, fake):
    fake.protocol_version = 1
    step_until(session, lambda: session.reasons["nominal"] > 3)
    opened = session.streams_opened
    server.thread.loop.call_soon_threadsafe(fake.begin_drain)
    step_until(session, lambda: session.streams_opened > opened)
    seen = session.reasons["nominal"]
    step_until(session, lambda: session.reasons["nominal"] > seen + 3)


def test_a_session_that_is_pushed_back_asks_later(session, fake):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    fake.refuse = lambda _step: ResourceExhausted("full", retry_after_ms=60)
    step_until(session, lambda: session.reasons["error_8"] > 2)
    refused, pushed_back = session.reasons["error_8"], session.reasons["pushed_back"]
    assert pushed_back > refused
    fake.refuse = None
    seen = session.reasons["nominal"]
    step_until(session, lambda: session.reasons["nominal"] > seen + 3)


def test_a_step_whose_stream_breaks_is_sent_again_on_the_next(session, fake):
    # A machine under load may take longer to reconnect than the longest budget of a config, a second.
    session._exchange._budget_seconds = 20.0
    step_until(session, lambda: session.reasons["nominal"] > 3)
    broken = session.global_step + 1

    def break_once(step):
        if step.packet.global_step == broken and sum(s.sequence == step.sequence for s in fake.steps) == 1:
            raise RuntimeError("the stream breaks")

    fake.before_answer = break_once
    session.step(0.5)
    assert session.guard.misses == 0
    assert [s.packet.global_step for s in fake.steps].count(broken) == 2


def test_packets_of_the_seed_host_reach_the_sink_and_the_metrics(mesh, server):
    point = MetricPoint(name="kasmina.seed.alpha", value=0.25, attributes={"seed_id": "seed-x"})
    packet = TelemetryPacket(packet_id="p", source_subsystem="kasmina", metrics=[point])
    host = RecordingHost()
    host.finalize_step = lambda _step_index: [packet]
    with TrainingSession(host=host, identity=mesh.identity("trainer"), tamiyo_address=server.address) as session:
        session.step(0.5)
    assert REGISTRY.get_sample_value("esper_kasmina_seed_alpha", {"seed_id": "seed-x"}) == 0.25
    seen = []
    with TrainingSession(
        host=host, identity=mesh.identity("trainer"), tamiyo_address=server.address, telemetry=seen.extend
    ) as session:
        session.step(0.5)
    assert seen == [packet]


def test_a_step_tells_what_the_host_saw_of_the_isolation_of_its_seeds_in_the_step_before(session, fake):
    of_others = MetricPoint(name="kasmina.breaker.state", value=2.0, attributes={"breaker": "memory_bounds"})
    violations = MetricPoint(name="kasmina.isolation.violations", value=1.0)
    breaker = MetricPoint(name="kasmina.breaker.state", value=3.0, attributes={"breaker": "gradient_isolation"})
    step_until(session, lambda: session.reasons["nominal"])
    last = session.global_step
    told = {last + 1: [of_others], last + 2: [violations, breaker, of_others]}
    session.host.finalize_step = lambda step: [TelemetryPacket(packet_id="p", metrics=told.get(step, []))]
    step_until(session, lambda: any(step.packet.global_step > last + 4 for step in fake.steps))
    heard = [
        (name, step.packet.global_step - last)
        for step in fake.steps
        for name in step.packet.training_metrics
        if name.startswith("kasmina.")
    ]
    assert sorted(heard) == [("kasmina.breaker.state", 3), ("kasmina.isolation.violations", 3)]
    [third] = [step.packet.training_metrics for step in fake.steps if step.packet.global_step == last + 3]
    assert (third["kasmina.isolation.violations"], third["kasmina.breaker.state"]) == (1.0, 3.0)


def test_a_controller_that_never_was_costs_nothing(mesh):
    with TrainingSession(
        host=RecordingHost(), identity=mesh.identity("trainer"), tamiyo_address="127.0.0.1:1"
    ) as session:
        for _ in range(50):
            assert session.step(0.5) == []
    assert session.reasons == {"mesh_unreachable": 50}


def test_a_fault_in_the_session_never_reaches_the_loop(session):
    session.host.export_seed_states = lambda: 1 / 0
    assert session.step(0.5) == []
    assert session.reasons["internal_error"] == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("part", "work"), [("_questions", "packet"), ("_answers", "receive"), ("_answers", "submit")])
def test_a_host_ends_its_step_whatever_fails_before_it(session, fake, part, work):
    ended = []
    session.host.finalize_step = lambda index: ended.append(index) or []
    fake.decide = pause
    step_until(session, lambda: session.reasons["command"] > 0)

    def breaks(*_, **__):
        raise LookupError("a fault of ours")

    setattr(getattr(session, part), work, breaks)
    step_until(session, lambda: session.reasons["internal_error"] > 0)
    assert ended == list(range(1, session.global_step + 1))


def test_a_step_is_observed_then_commands_are_applied_then_alphas_advance_then_it_is_finalized(session):
    calls, host = [], session.host

    def note(name, result):
        setattr(host, name, lambda *_: calls.append(name) or result)

    order = ["observe", "apply_pending", "advance_alphas", "finalize_step"]
    for name in order:
        note(name, [])
    for _ in range(3):
        session.step(0.5)
    assert calls == order * 3


def test_a_loss_that_is_no_number_is_a_step_too(session):
    ended = []
    session.host.finalize_step = lambda index: ended.append(index) or []
    session.step("none")
    assert session.reasons["bad_argument"] == 1
    assert ended == [1]


def test_ranks_that_come_apart_reach_the_loop(session):
    def apart():
        raise OutOfStep("a rank is gone")

    session.host.apply_pending = apart
    with pytest.raises(OutOfStep, match="a rank is gone"):
        session.step(1.0)


def test_a_forked_child_steps_without_touching_the_channel(session):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if session.step(0.5) == [] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    seen = session.reasons["nominal"]
    step_until(session, lambda: session.reasons["nominal"] > seen)
