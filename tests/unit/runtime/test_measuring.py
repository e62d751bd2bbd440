from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from esper_client.integrations.measuring import gradient_norm, samples_in


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(5, 2), 5), ([torch.zeros(3), torch.zeros(9)], 3), ({"name": "a", "x": torch.zeros(4, 1)}, 4),
        (Pair(torch.zeros(2), torch.zeros(2)), 2), (("text", (1, [torch.zeros(6)])), 6), (torch.zeros(()), None),
        ([], None), ("text", None), (None, None), ({}, None),
    ],
)  # fmt: skip
def test_the_samples_of_a_batch_are_those_of_its_first_tensor(batch, count):
    assert samples_in(batch) == count


def test_the_norm_is_over_all_gradients_that_an_optimizer_will_use():
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias, other.weight]}], lr=0.1)
    assert gradient_norm(optimizer) is None
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(gradient_norm(optimizer)) == 5.0
    model.bias.grad = torch.tensor([math.nan])
    assert math.isnan(float(gradient_norm(optimizer)))


def test_sparse_gradients_have_no_norm_here():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    assert gradient_norm(torch.optim.SGD(embedding.parameters(), lr=0.1)) is None
