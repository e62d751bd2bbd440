"""A mesh that never commands leaves a training as it is, bit for bit."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

import esper_client
from esper_rpc.testing import fake_mesh

STEPS = 40
PATIENCE_SECONDS = 30.0


@pytest.fixture
def mesh(tmp_path):
    with fake_mesh(tmp_path) as running:
        yield running


def _wait_until(holds):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def build(kind):
    torch.manual_seed(3)
    if kind == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.2),
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10),
        )  # fmt: skip
    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        return nn.Sequential(
            nn.Flatten(2), nn.Linear(8, 16), nn.Linear(16, 16), layer, nn.Flatten(1), nn.LazyLinear(10)
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def inputs_of(kind):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(STEPS, 16, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (STEPS, 16), generator=generator)
    return (images.squeeze(2) if kind == "transformer" else images), labels


def train(kind, optimizer_of, mesh):
    model, (images, labels) = build(kind), inputs_of(kind)
    model(images[0])
    optimizer = optimizer_of(model.parameters())
    address = esper_client.find_mesh(mesh.environ) if mesh is not None else None
    session = esper_client.attach(model, optimizer, mesh=address, step_budget_ms=500) if mesh is not None else None
    torch.manual_seed(11)
    losses = []
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(images[step]), labels[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if session is not None:
            session.step(loss)
            _wait_until(lambda: session.is_connected)
    state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), losses
    if session is not None:
        state += (session.reasons,)
        session.close()
    return state


@pytest.mark.parametrize("kind", ["cnn", "transformer", "mlp"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_are_bit_equal_to_a_training_without_a_mesh(mesh, kind, optimizer):
    optimizers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    }
    mesh.tamiyo.decide = lambda _step: None
    weights, state, losses = train(kind, optimizers[optimizer], None)
    told_weights, told_state, told_losses, reasons = train(kind, optimizers[optimizer], mesh)
    assert reasons == {"mesh_unreachable": 1, "nominal": STEPS - 1}
    assert losses == told_losses
    assert list(weights) == list(told_weights)
    assert all(torch.equal(weights[name], told_weights[name]) for name in weights)
    moments = zip(state["state"].values(), told_state["state"].values(), strict=True)
    for before, after in moments:
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
