"""A session that the mesh asks to roll back: real transport and signatures, decisions of the test."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import esper_client
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
from esper_rpc.testing import fake_mesh
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, HALT
from esper_servers.trainer import attach

TERMINAL = (CommandOutcome.RESULT_APPLIED, CommandOutcome.RESULT_REJECTED, CommandOutcome.RESULT_FAILED)
UNHURRIED = {f"ESPER_ROLLBACK_{phase}_MS": "60000" for phase in ("PREPARE", "COMMIT", "CONFIRM")}


class Loop:
    """A training loop; `settings` are those of the environment."""

    def __init__(self, mesh, home, **settings):
        torch.manual_seed(0)
        self.mesh = mesh
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        environ = {**mesh.environ, "ESPER_HOME": str(home), **UNHURRIED, **settings}
        self.session = attach(
            self.model, self.optimizer, environ=environ, mesh=esper_client.find_mesh(environ), step_budget_ms=1000,
            run_id="../a run",
        )  # fmt: skip
        self.pictures = {}

    def step(self):
        loss = self.model(torch.ones(8, 4)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        outcomes = self.session.step(loss)
        self.pictures.setdefault(self.session.global_step, repr(list(self.model.parameters())))
        return outcomes

    def step_until(self, condition, seconds=60):
        deadline, outcomes = time.monotonic() + seconds, []
        while not condition(outcomes):
            assert time.monotonic() < deadline, f"not reached: {outcomes} {self.session.reasons}"
            outcomes += [outcome for outcome in self.step() if outcome.result in TERMINAL]
        return outcomes


@pytest.fixture
def mesh(tmp_path):
    with fake_mesh(tmp_path / "mesh") as running:
        yield running


@pytest.fixture
def make_loop(mesh, tmp_path):
    made = []

    def make(**settings):
        made.append(Loop(mesh, tmp_path / "home", **settings))
        return made[-1]

    yield make
    for loop in made:
        loop.session.close()


def once(mesh, **payload):
    """Have the fake Tamiyo decide for one rollback, as soon as it is asked."""
    waiting = [payload]

    def decide(_step):
        if not waiting:
            return None
        command = AdaptationCommand(command_type=CommandType.COMMAND_TYPE_ROLLBACK)
        command.rollback_payload.update(waiting.pop())
        return command

    mesh.tamiyo.decide = decide


def test_the_mesh_rolls_a_run_back_and_is_told_of_it_anew(mesh, make_loop):
    loop = make_loop(ESPER_CHECKPOINTS_SNAPSHOT_EVERY_STEPS="5")
    loop.step_until(
        lambda _: loop.session.is_connected and loop.session.global_step % 5 == 2 < loop.session.global_step
    )
    opened = mesh.tamiyo.runs["../a run"]
    assert "rollback" in opened.features
    kept, before = loop.session.global_step - 2, loop.session.global_step
    once(mesh, reason="loss_spike")
    assert loop.step_until(lambda _: loop.session.global_step < before) == []
    assert loop.session.global_step == kept
    assert repr(list(loop.model.parameters())) == loop.pictures[kept]
    outcomes = loop.step_until(lambda outcomes: outcomes)
    assert [(o.result, o.reason) for o in outcomes] == [(CommandOutcome.RESULT_APPLIED, "fast")]
    loop.step_until(lambda _: mesh.tamiyo.runs["../a run"].receiver_epoch != opened.receiver_epoch)
    # What is decided from there on is for the run as it is now.
    once(mesh)
    assert loop.step_until(lambda outcomes: outcomes)[0].result == CommandOutcome.RESULT_APPLIED
    once(mesh)
    assert loop.step_until(lambda outcomes: outcomes)[0].reason == "local_limit"


def test_a_rollback_by_the_mesh_that_is_slow_or_late_has_consequences_for_the_run(make_loop, monkeypatch):
    loop = make_loop(ESPER_CHECKPOINTS_SNAPSHOT_EVERY_STEPS="1")
    loop.step()
    checkpoints, tolaria, asked = (
        loop.session.checkpoints,
        loop.session.tolaria,
        iter([{"elapsed_ms": 600.0}, {"is_late": True}]),
    )
    done = checkpoints._rollback.run
    monkeypatch.setattr(checkpoints._rollback, "run", lambda **wanted: replace(done(**wanted), **next(asked)))
    for level, is_halted in ((CONSERVATIVE, False), (HALT, True)):
        checkpoints.roll_back(latest_step=1, reason="loss_spike")
        assert (tolaria.emergencies.level, loop.session.halted) == (level, is_halted)
        assert tolaria.mode.is_active


def test_without_checkpoints_a_rollback_is_not_offered_and_refused(mesh, make_loop):
    loop = make_loop()
    loop.step_until(lambda _: loop.session.is_connected)
    assert "rollback" not in mesh.tamiyo.runs["../a run"].features
    once(mesh)
    assert loop.step_until(lambda outcomes: outcomes)[0].reason == "unsupported"


def test_a_run_goes_on_from_its_checkpoint_on_the_disk_in_another_session(make_loop, tmp_path):
    settings = {"ESPER_CHECKPOINTS_SAVE_EVERY_STEPS": "3"}
    first = make_loop(**settings)
    for _ in range(4):
        first.step()
    first.session.close()
    directories = list((tmp_path / "home" / "state" / "trainer" / "checkpoints").iterdir())
    assert [path.name for path in directories] == ["%2E%2E%2Fa%20run"]
    second = make_loop(**settings)
    assert second.session.checkpoints.resume().step == 3
    assert second.session.global_step == 3
    second.step()
    assert second.pictures[4] == first.pictures[4]
