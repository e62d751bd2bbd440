"""A step that asks when the loss is known and takes its answer after the optimizer."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import esper_client
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
from esper_rpc.testing import fake_mesh

PATIENCE_SECONDS = 30.0
BUDGET_MS = 50.0


@pytest.fixture
def mesh(tmp_path):
    with fake_mesh(tmp_path) as running:
        yield running


@contextmanager
def attached(mesh, budget_ms):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model(torch.zeros(1, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    address = esper_client.find_mesh(mesh.environ)
    with esper_client.attach(model, optimizer, mesh=address, step_budget_ms=budget_ms) as running:
        running.step(0.5)
        wait_until(lambda: running.is_connected)
        while not running.reasons["nominal"]:
            running.step(0.5)
        yield running


@pytest.fixture
def session(mesh):
    with attached(mesh, BUDGET_MS) as running:
        yield running


def wait_until(holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def pause(_step):
    return AdaptationCommand(command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_PAUSE)


def test_an_answer_that_came_while_the_loop_worked_is_carried_out_though_the_budget_is_over(mesh, session):
    mesh.tamiyo.before_answer = lambda _step: asyncio.sleep(2 * BUDGET_MS / 1e3)
    mesh.tamiyo.decide = pause
    misses = session.guard.misses
    session.begin_step(0.5)
    wait_until(lambda: not session.guard.awaits(session._questions.sequence))
    [queued, applied] = session.finish_step()
    assert (queued.result, applied.result) == (CommandOutcome.RESULT_QUEUED, CommandOutcome.RESULT_APPLIED)
    assert session.guard.misses == misses


def test_tamiyo_is_told_that_it_may_take_as_long_as_the_loop_is_busy(mesh):
    def is_told_after_a_busy_step():
        session.begin_step(0.5)
        time.sleep(0.02)
        session.finish_step()
        return mesh.tamiyo.steps[-1].budget_us >= 20_000

    with attached(mesh, budget_ms=2) as session:
        assert mesh.tamiyo.steps[-1].budget_us == 2_000
        wait_until(is_told_after_a_busy_step)


def test_a_step_begun_ahead_that_nobody_answers_is_missed_and_changes_nothing(mesh, session):
    gone = asyncio.Event()
    mesh.tamiyo.before_answer = lambda _step: gone.wait()
    session.begin_step(0.5)
    assert session.finish_step() == []
    assert session.reasons["deadline_missed"] >= 1


def test_what_the_loop_does_between_the_halves_is_not_counted_as_the_meshs(session):
    begun = time.perf_counter()
    session.begin_step(0.5)
    between = time.perf_counter()
    time.sleep(0.1)
    worked = time.perf_counter() - between
    session.finish_step()
    ours = time.perf_counter() - begun - worked
    timing = session.timings.last
    assert timing.total <= ours * 1e6
    assert timing.exchange >= 0


def test_a_step_that_was_not_finished_is_finished_before_the_next(mesh, session):
    steps, answered = session.global_step, sum(session.reasons.values())
    session.begin_step(0.5)
    session.begin_step(0.4)
    session.step(0.3)
    assert session.global_step == steps + 3
    assert sum(session.reasons.values()) == answered + 3
    assert session.finish_step() == []
    assert [round(step.packet.training_loss, 1) for step in mesh.tamiyo.steps[-3:]] == [0.5, 0.4, 0.3]


def test_halves_without_a_mesh_do_nothing():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="No mesh found"):
        session = esper_client.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=esper_client.find_mesh({"ESPER_HOME": "/nowhere"})
        )
    session.begin_step(0.5)
    assert session.finish_step() == []
