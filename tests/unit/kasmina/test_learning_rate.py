from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.learning_rate import OptimizerAuthority
from esper_servers.optim.controller import LearningRateConfig, UnifiedLRController
from esper_servers.optim.schedules import Cosine
from esper_servers.trainer import DetachedSession


def train(model, authority, optimizer, modules=(), steps=3):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(steps))
    for _ in range(steps):
        for part in (model, *modules):
            part.zero_grad()
        out = model(x)
        for module in modules:
            out = module(out)
        out.square().mean().backward()
        optimizer.step()
        authority.step()


def make(is_scheduled=False):
    torch.manual_seed(0)
    model, seeds = nn.Linear(4, 4), [nn.Linear(4, 4), nn.Linear(4, 4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if is_scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 100)
    return model, seeds, optimizer, OptimizerAuthority(optimizer)


def picture(optimizer):
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_a_released_module_is_trained_no_longer_and_all_else_is_as_if_it_had_never_been_there(is_scheduled):
    model, seeds, optimizer, authority = make(is_scheduled)
    authority.adopt(seeds[0])
    authority.adopt(seeds[1])
    train(model, authority, optimizer, seeds)
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    authority.release(seeds[0])
    assert all(torch.equal(optimizer.state[p][key], value) for p in kept for key, value in kept[p].items())
    weights = [p.clone() for p in seeds[0].parameters()], [p.clone() for p in seeds[1].parameters()]
    train(model, authority, optimizer, seeds)
    assert all(torch.equal(a, b) for a, b in zip(weights[0], seeds[0].parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[1], seeds[1].parameters(), strict=True))


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_after_a_release_an_earlier_state_of_the_optimizer_can_be_restored(is_scheduled):
    model, seeds, optimizer, authority = make(is_scheduled)
    authority.adopt(seeds[0])
    train(model, authority, optimizer, seeds[:1])
    before = picture(optimizer), copy.deepcopy(authority.state_dict())
    authority.adopt(seeds[1])
    train(model, authority, optimizer, seeds)
    authority.release(seeds[1])
    authority.load_state_dict(before[1])
    optimizer.load_state_dict(before[0])
    after = picture(optimizer)
    assert after["param_groups"] == before[0]["param_groups"]
    assert all(
        torch.equal(after["state"][i][k], v) for i, state in before[0]["state"].items() for k, v in state.items()
    )
    assert len(authority.state_dict()["followers"]) == is_scheduled


def test_a_module_is_found_after_the_user_restored_the_optimizer():
    model, seeds, optimizer, authority = make()
    authority.adopt(seeds[0])
    train(model, authority, optimizer, seeds[:1])
    optimizer.load_state_dict(picture(optimizer))
    authority.release(seeds[0])
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == set(model.parameters())


def test_a_module_that_was_not_adopted_is_left_alone():
    model, seeds, optimizer, authority = make()
    train(model, authority, optimizer)
    before = picture(optimizer)
    authority.release(seeds[0])
    assert picture(optimizer)["param_groups"] == before["param_groups"]
    assert len(optimizer.state) == 2


def controlled(optimizer):
    return UnifiedLRController(optimizer, schedule=Cosine(total_steps=200), config=LearningRateConfig(warm_up_epochs=4))


def test_a_host_whose_rates_a_controller_sets_fossilises_at_a_tenth_of_them_after_a_warm_up(make_rig):
    rig = make_rig(make_authority=controlled)
    assert rig.order(rig.optimizer_command(0.5)).result == CommandOutcome.RESULT_APPLIED
    rig.grow(lifecycle.FOSSILIZED)
    assert rig.authority.rates[1] < rig.authority.rates[0] * 0.1
    rig.train(5)
    assert rig.authority.rates[1] == pytest.approx(rig.authority.rates[0] * 0.1, rel=1e-3)
    assert rig.authority.rates[0] == pytest.approx(Cosine(total_steps=200).rate(0.1, rig.step_index) * 0.5)
    assert rig.authority.violations == 0


def test_a_run_under_a_controller_resumes_bit_equal_with_its_fossil(make_rig):
    first = make_rig(make_authority=controlled)
    first.grow(lifecycle.FOSSILIZED)
    first.train(2)
    parts = {"model": first.model, "host": first.host, "optimizer": first.optimizer}
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    first.train(4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_rig(make_authority=controlled)
    second.model.load_state_dict(saved["model"])
    second.host.load_state_dict(saved["host"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.train(4)
    assert first.authority.rates == second.authority.rates
    assert second.authority.violations == 0
    weights = [[*rig.model.parameters(), *rig.slot.site.seed.parameters()] for rig in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_without_a_mesh_schedules_go_on_and_are_restored():
    optimizers = [torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1) for _ in range(2)]
    controllers = [controlled(optimizer) for optimizer in optimizers]
    sessions = [DetachedSession(nn.Linear(2, 2), controller) for controller in controllers]
    for _ in range(5):
        sessions[0].step(0.1)
    sessions[1].load_state_dict(sessions[0].state_dict())
    assert controllers[0].rates == controllers[1].rates == (Cosine(total_steps=200).rate(0.1, 5),)
