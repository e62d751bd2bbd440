from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from esper_rpc.errors import FailedPrecondition, InvalidRequest
from esper_servers.tolaria.state.training_state import RandomNumbers, TrainingState, copied, first_not_finite, placed


def test_a_training_goes_on_bit_equal_after_it_was_restored(training):
    training.train()
    saved, expected = copied(training.state.capture()), training.picture()
    training.train()
    later = training.picture()
    training.state.restore(saved)
    assert training.picture() == expected
    training.train()
    assert training.picture() == later


def test_a_state_may_be_restored_again_and_again(training):
    training.train()
    saved, expected = copied(training.state.capture()), training.picture()
    for _ in range(3):
        training.state.restore(saved)
        training.train()
    training.state.restore(saved)
    assert training.picture() == expected


class Drawing:
    """A part, say a data loader, that draws random numbers when it is restored."""

    def state_dict(self):
        return {}

    def load_state_dict(self, _state):
        torch.rand(3)


def test_random_numbers_are_restored_when_all_else_is(training):
    training.state.register("loader", Drawing())
    saved = copied(training.state.capture())
    expected = torch.rand(2)
    training.state.restore(saved)
    assert torch.equal(torch.rand(2), expected)


def test_moments_go_back_into_the_memory_that_they_are_in(training):
    training.train()
    saved = copied(training.state.capture())
    places = {id(p): training.optimizer.state[p]["exp_avg"].data_ptr() for p in training.model.parameters()}
    training.train()
    training.state.restore(saved)
    assert places == {id(p): training.optimizer.state[p]["exp_avg"].data_ptr() for p in training.model.parameters()}


def test_moments_that_are_younger_than_the_checkpoint_are_gone(training):
    saved = copied(training.state.capture())
    training.train()
    training.state.restore(saved)
    assert not training.optimizer.state
    assert training.optimizer.param_groups[0]["lr"] == 0.01


def test_gradients_of_what_is_gone_are_gone(training):
    saved = copied(training.state.capture())
    training.train()
    training.state.restore(saved)
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_a_copy_goes_into_spare_tensors_of_the_same_shape_only():
    state = {"a": torch.randn(3), "b": [torch.ones(2), (torch.zeros(1, dtype=torch.int64), "x")]}
    spare = copied(copy.deepcopy(state))
    reused = copied(state, spare)
    assert reused["a"].data_ptr() == spare["a"].data_ptr()
    assert reused["b"][1][0].data_ptr() == spare["b"][1][0].data_ptr()
    for other in ({"a": torch.randn(4)}, {"a": torch.randn(3).double()}, {"a": "a"}, [], None):
        again = copied(state, other)
        assert torch.equal(again["a"], state["a"])
        assert again["a"].data_ptr() != state["a"].data_ptr()


def test_a_copy_shares_nothing_and_keeps_classes():
    parameter = nn.Parameter(torch.randn(3))
    model = nn.BatchNorm1d(3)
    state = {"p": parameter, "buffers": model.state_dict(), "list": [[1]]}
    result = copied(state)
    assert type(result["p"]) is torch.Tensor
    assert not result["p"].requires_grad
    assert result["buffers"]._metadata == model.state_dict()._metadata
    state["list"][0].append(2)
    assert result["list"] == [[1]]
    assert placed(state, state)["p"].data_ptr() == parameter.data_ptr()


def test_all_generators_go_back():
    numbers = RandomNumbers()
    saved = copied(numbers.state_dict())

    def draw():
        return torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    first = draw()
    numbers.load_state_dict(saved)
    assert draw() == first


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "scheduler"])
def test_a_name_that_is_taken_is_refused(training, name):
    with pytest.raises(InvalidRequest, match=name):
        training.state.register(name, training.scheduler)


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(training):
    saved = copied(training.state.capture())
    wider = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))
    other = TrainingState(wider, torch.optim.AdamW(wider.parameters()))
    with pytest.raises(FailedPrecondition, match="same parts: scheduler"):
        other.check(saved)
    other.register("scheduler", training.scheduler)
    with pytest.raises(FailedPrecondition, match=r"another model: 3\.bias differs"):
        other.check(saved)
    training.state.check(saved)


def test_moments_of_another_parameter_are_seen():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)])
    x = torch.ones(1, 2)
    saved = []
    for order in ((0, 1), (1, 0)):
        optimizer = torch.optim.AdamW([{"params": model[number].parameters()} for number in order])
        sum(layer(x).sum() for layer in model).backward()
        optimizer.step()
        saved.append((TrainingState(model, optimizer), optimizer))
    with pytest.raises(FailedPrecondition, match="another order"):
        saved[1][0].restore(copied(saved[0][0].capture()))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(training, broken):
    assert first_not_finite(training.state.capture()) == ""
    with torch.no_grad():
        training.model[3].bias[1] = broken
    assert first_not_finite(training.state.capture()) == "3.bias"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_narrow_and_wide_weights_are_looked_at_too(dtype):
    weights = torch.ones(9).to(dtype)
    assert first_not_finite({"model": {"w": weights, "empty": torch.empty(0), "count": torch.tensor(3)}}) == ""
    assert first_not_finite({"model": {"w": torch.tensor([1.0, torch.nan]).to(dtype)}}) == "w"
