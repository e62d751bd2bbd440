from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_rpc.testing import FakeClock
from esper_servers.tolaria.checkpoint_store import CheckpointStore
from esper_servers.tolaria.snapshot_cache import SnapshotCache
from esper_servers.tolaria.training_state import TrainingState


class Training:
    """A small training whose every source of state is registered."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.state = TrainingState(self.model, self.optimizer)
        self.state.register("scheduler", self.scheduler)

    def train(self, steps=3):
        for _ in range(steps):
            self.optimizer.zero_grad()
            # Data and dropout come from the generator of torch, so that it counts too.
            self.model(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def picture(self):
        return repr(flat(self.state.capture()))


def flat(state):
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for each in state for leaf in flat(each)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


@pytest.fixture
def training():
    return Training()


@pytest.fixture
def make_training():
    return Training


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def cache():
    return SnapshotCache()


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")
