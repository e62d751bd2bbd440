"""Clocks that differ by ten minutes, or are stepped while a run is open, cost no connection and no command."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
import torch
from torch import nn

from esper_client import TamiyoClient, attach
from esper_client.discovery import find_mesh
from esper_rpc.identity import Authority, Identity
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
from esper_rpc.proto.tamiyo.v1 import CloseRunRequest
from esper_rpc.steady_clock import SteadyClock
from esper_rpc.testing import TAMIYO, FakeTamiyo, fake_mesh, serving

MINUTES_NS = 60 * 10**9
PATIENCE_SECONDS = 30.0


@pytest.mark.parametrize("minutes", [-10, 10])
async def test_a_leaf_from_an_authority_with_another_clock_is_accepted(mesh, minutes):
    authority = Authority.load(
        mesh.directory / "pki", clock=lambda: datetime.now(UTC) + timedelta(minutes=minutes)
    )  # fmt: skip
    tamiyo, trainer = (
        Identity.of(authority.issue(mesh.identity(role).spiffe_id)).save(mesh.identity_dir(role))
        for role in ("tamiyo", "trainer")
    )
    async with serving(tamiyo, (TAMIYO, FakeTamiyo(mesh.keyring("tamiyo"))), raw_methods=FakeTamiyo.RAW_METHODS) as at:
        async with TamiyoClient(at.address, identity=trainer) as client:
            assert not (await client.close_run(CloseRunRequest(run_id="r"))).closed


def pause(_step):
    return AdaptationCommand(
        version=1, command_id=str(uuid.uuid4()), command_type=CommandType.COMMAND_TYPE_PAUSE, execution_deadline_ms=1
    )  # fmt: skip


def train_until_applied(session, model, times):
    deadline, applied = time.monotonic() + PATIENCE_SECONDS, 0
    while applied < times:
        assert time.monotonic() < deadline, dict(session.reasons)
        model(torch.ones(2, 4)).sum().backward()
        outcomes = session.step(1.0)
        assert all(outcome.result != CommandOutcome.RESULT_REJECTED for outcome in outcomes), outcomes
        applied += sum(outcome.result == CommandOutcome.RESULT_APPLIED for outcome in outcomes)


@pytest.fixture
def fake(tmp_path):
    with fake_mesh(tmp_path) as fake:
        fake.tamiyo.decide = pause
        yield fake


@pytest.fixture
def training(fake):
    def start():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return attach(model, optimizer, mesh=find_mesh(fake.environ), step_budget_ms=50.0), model

    return start


@pytest.mark.parametrize("minutes", [-10, 10])
def test_commands_of_a_controller_with_another_clock_are_carried_out(fake, training, minutes):
    fake.tamiyo.clock_ns = lambda: time.time_ns() + minutes * MINUTES_NS
    session, model = training()
    with session:
        train_until_applied(session, model, 3)


def test_a_step_of_the_trainers_clock_changes_nothing(training, monkeypatch):
    session, model = training()
    with session:
        train_until_applied(session, model, 3)
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 600)
        monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 10 * MINUTES_NS)
        train_until_applied(session, model, 3)


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_controllers_clock_goes_on_evenly_when_that_of_its_machine_is_stepped(minutes):
    wall, monotonic = [1_700_000_000 * 10**9], [5]
    clock = SteadyClock(lambda: wall[0], lambda: monotonic[0])
    wall[0] += minutes * MINUTES_NS
    monotonic[0] += 7
    assert clock() == 1_700_000_000 * 10**9 + 7
