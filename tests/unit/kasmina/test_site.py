from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.site import Site


class Broken(nn.Module):
    """A seed whose output is not a number, or that cannot run at all."""

    def __init__(self, *, raises=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.raises = raises

    def forward(self, h):
        if self.raises:
            raise RuntimeError("a seed must not stop a training")
        return h * self.weight * float("nan")


def replace_seed(rig, module):
    """Swap the module and keep stage and alpha."""
    alpha = rig.slot.site.alpha
    rig.slot.site.hold(module)
    rig.slot.site.alpha = alpha


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_training_seed_leaves_output_and_host_gradients_bit_equal(rig):
    rig.grow(lifecycle.TRAINING)
    plain = copy.deepcopy(rig.plain)
    plain.load_state_dict(rig.model.state_dict())
    for model in (plain, rig.model):
        model.zero_grad(set_to_none=True)
        model(rig.x).square().sum().backward()
    assert torch.equal(plain(rig.x), rig.model(rig.x))
    expected, got = gradients(plain), gradients(rig.model)
    assert list(expected) == list(got)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_training_seed_gets_a_gradient_and_learns(rig):
    rig.grow(lifecycle.TRAINING)
    before = [p.clone() for p in rig.slot.site.seed.parameters()]
    rig.train()
    assert rig.slot.gradient_norm > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, rig.slot.site.seed.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_seed_of_nan_never_reaches_the_host_output_while_it_trains(rig, mode):
    rig.grow(lifecycle.TRAINING)
    expected = rig.model(rig.x)
    replace_seed(rig, Broken())
    rig.model.train(mode == "training")
    assert torch.equal(rig.model(rig.x), expected)


def test_a_seed_of_nan_never_reaches_the_output_while_it_blends(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(5)
    replace_seed(rig, Broken())
    out = rig.model(rig.x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in rig.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.PROBATIONARY])
def test_a_seed_that_raises_does_not_stop_the_training_and_is_culled(rig, stage):
    rig.grow(stage)
    rig.train()
    replace_seed(rig, Broken(raises=True))
    rig.train()
    assert rig.slot.stage in (lifecycle.CULLED, lifecycle.EMBARGOED)
    rig.train()


ON_TRIAL = [lifecycle.SHADOWING, lifecycle.PROBATIONARY]


@pytest.mark.parametrize("is_fine_tuning", [False, True])
@pytest.mark.parametrize("stage", [lifecycle.BLENDING, *ON_TRIAL])
def test_a_blended_seed_sees_a_detached_host_and_learns_unless_it_is_only_judged(rig, stage, is_fine_tuning):
    rig.grow(stage)
    rig.train()
    if is_fine_tuning and stage != lifecycle.BLENDING:
        assert rig.do("FINE_TUNE").result == CommandOutcome.RESULT_APPLIED
    rig.model.zero_grad(set_to_none=True)
    rig.slot.clear_gradients()
    rig.model(rig.x).square().sum().backward()
    assert rig.model[2].weight.grad is None
    assert rig.model[4].weight.grad is not None
    learns = any(p.grad is not None for p in rig.slot.site.seed.parameters())
    assert learns == (is_fine_tuning or stage == lifecycle.BLENDING)


def modes_of_grad(module):
    """Tell at each forward pass of a module whether autograd is on."""
    seen = []
    module.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize("stage", ON_TRIAL)
def test_a_probe_runs_without_autograd_until_the_seed_is_fine_tuned_and_again_in_the_next_stage(rig, stage):
    rig.grow(stage)
    seen = modes_of_grad(rig.slot.site.seed)
    before = [p.clone() for p in rig.slot.site.seed.parameters()]
    rig.train()
    assert all(torch.equal(a, b) for a, b in zip(before, rig.slot.site.seed.parameters(), strict=True))
    rig.do("FINE_TUNE")
    rig.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, rig.slot.site.seed.parameters(), strict=True))
    if stage == lifecycle.SHADOWING:
        rig.do("EVALUATE")
    else:
        rig.slot.is_fine_tuning = False
    rig.train()
    # A gate tries it, too.
    assert [mode for mode, _ in itertools.groupby(seen)] == [False, True, False]


@pytest.mark.parametrize("stage", [lifecycle.BLENDING, *ON_TRIAL])
@pytest.mark.parametrize("keeps_graph", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_a_loss_right_behind_a_blended_seed_can_be_differentiated(rig, stage, keeps_graph, learns):
    rig.grow(stage)
    rig.train()
    if not learns:
        replace_seed(rig, nn.Tanh())
    rig.slot.site.keeps_graph = keeps_graph
    rig.model.zero_grad(set_to_none=True)
    out = rig.model[:3](rig.x)
    # In place, as the activation behind a layer often is.
    out.relu_().sum().backward()
    # DistributedDataParallel waits for a gradient of every parameter.
    gradient = rig.model[2].weight.grad
    assert gradient is not None and not gradient.any() if keeps_graph else gradient is None


def test_a_probe_gives_what_blending_at_full_alpha_gives(rig):
    rig.grow(lifecycle.SHADOWING)
    site = rig.slot.site
    site.stage = lifecycle.BLENDING
    expected = rig.model(rig.x)
    site.stage = lifecycle.SHADOWING
    assert torch.equal(rig.model(rig.x), expected)


def test_blending_mixes_by_alpha(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(7)
    site = rig.slot.site
    rig.model.eval()
    hidden = rig.model[:2](rig.x)
    h, alpha = site.host(hidden), rig.slot.schedule.value()
    assert 0 < alpha < 1
    torch.testing.assert_close(site(hidden), alpha * site.seed(h) + (1 - alpha) * h, rtol=1e-6, atol=1e-6)


def test_a_fossil_is_fully_live(rig):
    rig.grow(lifecycle.FOSSILIZED)
    rig.model.zero_grad(set_to_none=True)
    rig.model(rig.x).square().sum().backward()
    assert rig.model[2].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in rig.slot.site.seed.parameters())


@pytest.mark.parametrize("stage", [None, lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.FOSSILIZED])
def test_the_host_keeps_its_names_in_every_stage(rig, stage):
    if stage is not None:
        rig.grow(stage)
    assert list(rig.model.state_dict()) == list(rig.plain.state_dict())
    assert [n for n, _ in rig.model.named_parameters()] == [n for n, _ in rig.plain.named_parameters()]


def test_the_own_checkpoint_of_the_user_goes_in_and_out(rig):
    saved = {key: torch.randn_like(value) for key, value in rig.plain.state_dict().items()}
    assert rig.model.load_state_dict(saved) == nn.Module().load_state_dict({})
    assert all(torch.equal(saved[key], value) for key, value in rig.model.state_dict().items())


def test_batch_norm_statistics_survive_a_site_around_them():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    expected = copy.deepcopy(model)
    model[0] = Site(model[0])
    for each in (expected, model):
        each.train()
        each(torch.arange(32.0).reshape(8, 4))
        each.eval()
    fresh = nn.Sequential(Site(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), nn.Linear(4, 2)).eval()
    fresh.load_state_dict(expected.state_dict())
    x = torch.ones(3, 4)
    assert torch.equal(fresh(x), expected(x))
    assert torch.equal(model(x), expected(x))


def test_a_host_may_have_parameters_of_the_names_that_a_site_uses():
    host = nn.Linear(4, 4)
    names = vars(Site(nn.Linear(4, 4))).keys() - vars(nn.Linear(4, 4)).keys() - {"_host", "_seed", "_blend", "_version"}
    for name in names:
        host.register_parameter(name, nn.Parameter(torch.ones(1)))
    site = Site(host)
    site.hold(nn.Linear(4, 4))
    assert {"_foreign", "around_backward", "hook_ms"} < names
    assert site.state_dict().keys() == {"weight", "bias", *names}
    assert site.take_foreign() == []


def test_a_site_shows_the_attributes_of_its_host(rig):
    assert rig.model[0].in_features == 6
    assert rig.model[0].weight is rig.sites["0"].host.weight


def test_training_and_evaluation_reach_host_and_seed(rig):
    rig.grow(lifecycle.TRAINING)
    site = rig.slot.site
    rig.model.eval()
    assert (site.host.training, site.seed.training) == (False, False)
    rig.model.train()
    assert (site.host.training, site.seed.training) == (True, True)


def test_a_cast_model_casts_its_seed(rig):
    rig.grow(lifecycle.BLENDING)
    rig.train(3)
    rig.model.double()
    assert rig.model(rig.x.double()).dtype == torch.float64


@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.SHADOWING])
def test_a_seed_goes_on_in_a_model_that_was_cast(rig, stage):
    rig.grow(stage)
    rig.train(3)
    rig.model.double()
    rig.x = rig.x.double()
    rig.train(2)
    assert (rig.slot.stage, rig.slot.site.failure, rig.slot.site.dtype) == (stage, "", torch.float64)


def test_a_seed_of_a_model_that_was_cast_passes_its_gates(rig):
    rig.grow(lifecycle.SHADOWING)
    rig.model.double()
    rig.x = rig.x.double()
    rig.train(2)
    assert rig.do("EVALUATE").result == CommandOutcome.RESULT_APPLIED
    rig.order(rig.pause(rig.seed_id))
    rig.clock.advance(2.0)
    rig.train(2)
    assert (rig.slot.stage, rig.slot.site.paused) == (lifecycle.PROBATIONARY, False)


def test_a_fossil_is_restored_into_a_model_that_was_cast(rig):
    rig.grow(lifecycle.FOSSILIZED)
    rig.model.bfloat16()
    before = rig.model(rig.x.bfloat16())
    rig.host.load_state_dict(rig.host.state_dict())
    assert torch.equal(before, rig.model(rig.x.bfloat16()))


@pytest.mark.parametrize("stage", [lifecycle.TRAINING, lifecycle.BLENDING, lifecycle.FOSSILIZED])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_while_seeds_learn(rig, stage, copied):
    rig.grow(stage)
    rig.train(3)
    twin = copied(rig.model)
    before = {name: p.clone() for name, p in rig.model.named_parameters()}
    assert torch.equal(twin(rig.x), rig.model(rig.x))
    twin(rig.x).sum().backward()
    assert all(p.grad is None for p in rig.slot.site.own_parameters)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in rig.model.named_parameters())
    rig.train(2)
    assert rig.slot.stage == stage


# Dynamo looks at .grad of every graph input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_host_is_not_compiled_anew_when_a_seed_germinates(rig):
    compilations = []

    def count(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(rig.model, backend=count)
    compiled(rig.x)
    before = len(compilations)
    rig.grow(lifecycle.TRAINING)
    assert torch.equal(compiled(rig.x), rig.model(rig.x))
    compiled(rig.x)
    assert len(compilations) == before
