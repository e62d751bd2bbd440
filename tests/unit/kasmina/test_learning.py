"""What a seed's gradients and optimizer do, against the plain ones of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_servers.kasmina.learning import SEED_LEARNING_RATE, clip_gradients, learn, optimizer_of


def module_with_gradients(scale):
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_as_torch_does(scale):
    module = module_with_gradients(scale)
    plain = copy.deepcopy(module)
    for mine, other in zip(module.parameters(), plain.parameters(), strict=True):
        other.grad = mine.grad.clone()
    norm = clip_gradients(list(module.parameters()), 1.0)
    assert norm == float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
    for mine, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_without_gradients_there_is_no_norm():
    assert clip_gradients(list(nn.Linear(2, 2).parameters()), 1.0) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(value):
    module = module_with_gradients(1.0)
    module.bias.grad[0] = value
    assert not torch.isfinite(torch.tensor(clip_gradients(list(module.parameters()), 1.0)))


def test_it_learns_what_plain_adamw_learns():
    module, plain = module_with_gradients(1.0), module_with_gradients(1.0)
    mine = optimizer_of(list(module.parameters()))
    other = torch.optim.AdamW(plain.parameters(), lr=SEED_LEARNING_RATE)
    for _ in range(20):
        mine.step()
        other.step()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_complex_parameters_learn_too():
    module = nn.Linear(3, 3, dtype=torch.complex64)
    before = module.weight.detach().clone()
    optimizer = optimizer_of(list(module.parameters()))
    module(torch.ones(2, 3, dtype=torch.complex64)).abs().sum().backward()
    learn(optimizer)
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_goes_on_after_a_cast(dtype):
    module = module_with_gradients(1.0)
    optimizer = optimizer_of(list(module.parameters()))
    learn(optimizer)
    module.to(dtype)
    before = module.weight.detach().clone()
    learn(optimizer)
    assert not torch.equal(module.weight, before)
    assert optimizer.state[module.weight]["exp_avg"].dtype == dtype
    assert optimizer.state[module.weight]["step"] == 2


def test_where_nothing_learns_there_is_no_optimizer():
    assert optimizer_of([]) is None
