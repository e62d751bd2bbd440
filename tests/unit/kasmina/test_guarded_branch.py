from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_servers.kasmina import lifecycle


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, error):
        ctx.error = error
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


class FailsBackward(nn.Module):
    """A seed that runs, and cannot be differentiated."""

    def __init__(self, error):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.error = error

    def forward(self, h):
        return _Failing.apply(h * self.scale, self.error)


class FailsForward(FailsBackward):
    def forward(self, h):
        raise self.error


CUDA_OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_OOM = RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried to")
ERRORS = [(CUDA_OOM, "out_of_memory"), (CPU_OOM, "out_of_memory"), (ValueError("a bug"), "seed_failed")]
ON_TRIAL = [lifecycle.SHADOWING, lifecycle.PROBATIONARY]
STAGES = [lifecycle.TRAINING, lifecycle.BLENDING, *ON_TRIAL]


def replace_seed(rig, module):
    alpha = rig.slot.site.alpha
    rig.slot.site.hold(module)
    rig.slot.site.alpha = alpha


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [FailsForward, FailsBackward])
@pytest.mark.parametrize(("error", "reason"), ERRORS, ids=["cuda", "cpu", "other"])
def test_a_seed_that_fails_forwards_or_backwards_is_culled_and_the_step_goes_on(rig, stage, kind, error, reason):
    rig.grow(stage)
    rig.train()
    if stage in ON_TRIAL:
        # Otherwise it is only judged, and nothing goes backwards.
        rig.do("FINE_TUNE")
    replace_seed(rig, kind(error))
    before = rig.model[4].weight.clone()
    rig.optimizer.zero_grad()
    loss = nn.functional.cross_entropy(rig.model(rig.x), rig.y)
    loss.backward()
    rig.optimizer.step()
    told = [each["reason"] for each in rig.told("fallback_applied")]
    assert (rig.slot.stage, told) == (lifecycle.CULLED, [reason])
    assert not torch.equal(rig.model[4].weight, before)
    rig.train()


def test_memory_that_runs_out_in_the_optimizer_of_a_seed_culls_it_and_the_step_goes_on(rig, monkeypatch):
    rig.grow(lifecycle.TRAINING)

    def step():
        raise CUDA_OOM

    monkeypatch.setattr(rig.slot.optimizer, "step", step)
    nn.functional.cross_entropy(rig.model(rig.x), rig.y).backward()
    told = {name: attributes["reason"] for name, attributes in rig.events()}
    assert (told["fallback_applied"], told["emergency_cleanup"]) == ("out_of_memory", "out_of_memory")
    assert rig.slot.stage == lifecycle.CULLED
    rig.train(2)


def test_a_seed_that_fails_backwards_leaves_the_gradients_of_the_host_as_they_would_be(rig):
    rig.grow(lifecycle.TRAINING)
    replace_seed(rig, FailsBackward(CUDA_OOM))
    plain = copy.deepcopy(rig.plain)
    plain.load_state_dict(rig.model.state_dict())
    for model in (plain, rig.model):
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(rig.x), rig.y).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, rig.model.get_parameter(name).grad), name


@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING])
def test_the_gradients_of_a_seed_are_those_of_plain_autograd(rig, stage):
    rig.grow(stage)
    rig.train(5)
    site, seed = rig.slot.site, rig.slot.site.seed
    hidden = rig.model[:2](rig.x).detach()
    seed.zero_grad(set_to_none=True)
    out = site(hidden)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    h = site.host(hidden).detach()
    share = 1.0 if stage == lifecycle.TRAINING else site.alpha
    expected = torch.autograd.grad(seed(h), list(seed.parameters()), share * weights)
    for parameter, gradient in zip(seed.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_backward_pass_that_keeps_its_graph_may_be_run_again(rig):
    rig.grow(lifecycle.TRAINING)
    loss = rig.model(rig.x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in rig.slot.site.seed.parameters()]
    loss.backward()
    for parameter, gradient in zip(rig.slot.site.seed.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    assert rig.slot.site.failure == ""


def test_what_a_step_computed_for_a_seed_is_let_go_of_after_its_backward_pass(rig):
    rig.grow(lifecycle.TRAINING)
    out = rig.model[2](rig.model[:2](rig.x))
    branch = next(node for node in walk(out.grad_fn) if type(node).__name__ == "_GuardedBackward").branch
    assert branch.output is not None
    out.sum().backward()
    assert branch.output is None


def walk(node):
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            waiting += [following for following, _ in node.next_functions]
