"""The sentence we sell, as tests: a session whose mesh is slow, hung, dead, restarting or lying."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid

import pytest

from esper_client import LoopThread, RunDescription, SessionConfig, TrainingSession
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
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
    sent = [o.command_id for step in fake.steps for o in step.outcomes]
    assert sent[0] == session.host.envelopes[0][0].nonce
    assert len(sent) == len(set(sent))


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
def test_a_forked_child_steps_without_touching_the_channel(session):
    step_until(session, lambda: session.reasons["nominal"] > 3)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if session.step(0.5) == [] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    seen = session.reasons["nominal"]
    step_until(session, lambda: session.reasons["nominal"] > seen)
