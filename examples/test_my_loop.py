"""How a training loop is tested against a fake Tamiyo: run it with pytest.

The server, its TLS and the signatures are real; only the decisions are yours.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper_client
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
from esper_rpc.testing import fake_mesh


@pytest.fixture
def mesh(tmp_path):
    with fake_mesh(tmp_path) as running:
        yield running


def train(mesh, steps):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outcomes = []
    with esper_client.attach(
        model, optimizer, mesh=esper_client.find_mesh(mesh.environ), step_budget_ms=200
    ) as session:
        for _ in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            outcomes += session.step(loss)
    return outcomes


def test_my_loop_pauses_when_it_is_told_to(mesh):
    mesh.tamiyo.decide = lambda _step: AdaptationCommand(command_type=CommandType.COMMAND_TYPE_PAUSE)
    outcomes = train(mesh, steps=200)
    assert any(outcome.result == CommandOutcome.RESULT_APPLIED for outcome in outcomes)


def test_my_loop_runs_on_when_the_mesh_says_nothing(mesh):
    mesh.tamiyo.decide = lambda _step: None
    assert train(mesh, steps=50) == []
