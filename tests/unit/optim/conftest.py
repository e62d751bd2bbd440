from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def make_model():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    return make


@pytest.fixture
def train():
    """Take so many steps on fixed batches; `through` are modules behind the model."""

    def run(model, optimizer, steps=3, *, through=(), after=lambda: None, first=0):
        for step in range(first, first + steps):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
            for module in through:
                out = module(out)
            out.square().mean().backward()
            optimizer.step()
            after()

    return run
