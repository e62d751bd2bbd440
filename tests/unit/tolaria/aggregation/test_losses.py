from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.tolaria.aggregation.aggregator import AggregationConfig, GradientAggregator
from esper_servers.tolaria.aggregation.losses import backward, by_tag
from esper_servers.tolaria.aggregation.weights import SeedLoss, total_loss


@pytest.fixture
def scene():
    """A model, a seed on its middle, and the losses of both."""
    torch.manual_seed(0)
    model, seed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), nn.Linear(6, 6)
    x, y = torch.randn(8, 4), torch.randn(8, 3)

    def losses():
        h = model[0](x)
        host = (model[1](h) - y).square().mean()
        # Its branch stands on a detached feature map, as in Kasmina, and reaches what is behind the site.
        return host, (model[1](seed(h.detach())) - y).abs().mean()

    return model, seed, losses


def seed_loss(loss, **options):
    return SeedLoss(**{"loss": loss, "stage": Stage.SEED_LIFECYCLE_STAGE_TRAINING, "samples": 8, **options})


def test_without_conflicts_gradients_are_those_of_the_total_loss(scene):
    model, seed, losses = scene
    host, own = losses()
    twin, twin_seed = copy.deepcopy(model), copy.deepcopy(seed)
    total_loss(host, [seed_loss(own)], host_samples=8).backward()
    expected = [p.grad.clone() for p in (*model.parameters(), *seed.parameters())]
    host, own = losses()
    aggregator = GradientAggregator(AggregationConfig(threshold=-1.0))
    found = backward(
        aggregator, host, {"a": seed_loss(own, parameters=list(seed.parameters()))}, list(model.parameters()),
        host_samples=8,
    )  # fmt: skip
    assert found.conflicts == ()
    for parameter, gradient in zip((*model.parameters(), *seed.parameters()), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twin_seed.parameters(), seed.parameters(), strict=True))


def test_a_seed_that_pulls_against_the_model_is_projected(scene):
    model, _, losses = scene
    host, _ = losses()
    aggregator = GradientAggregator()
    found = backward(
        aggregator, host, {"a": seed_loss(-3 * host, is_fine_tuning=True)}, list(model.parameters()), host_samples=8
    )
    assert found.conflicts == ("a",)
    kept = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses()[0].backward()
    for gradient, parameter in zip(kept, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss_of",
    [lambda both: both.sum() * 100, lambda both: (both * torch.full((3,), 100.0)).sum()],
    ids=["one number", "one tensor"],
)
def test_one_gradient_for_two_parameters_is_not_changed_twice(loss_of):
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    backward(GradientAggregator(), loss_of(first + second), {}, [first, second], host_samples=1)
    assert first.grad.data_ptr() != second.grad.data_ptr()
    assert float(torch.cat([first.grad, second.grad]).norm()) == pytest.approx(10.0, rel=1e-5)


def test_a_seed_without_weight_costs_no_pass(scene):
    model, _, losses = scene
    host, _ = losses()
    idle = seed_loss(torch.tensor(1.0), stage=Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED)
    backward(GradientAggregator(), host, {"a": idle}, list(model.parameters()), host_samples=8)
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_that_depends_on_nothing_is_refused_by_name(scene):
    model, _, losses = scene
    host, _ = losses()
    with pytest.raises(InvalidRequest, match="The loss of seed-0"):
        backward(
            GradientAggregator(),
            host,
            {"seed-0": seed_loss(torch.tensor(1.0))},
            list(model.parameters()),
            host_samples=8,
        )
    assert all(p.grad is None for p in model.parameters())


def test_the_losses_of_samples_are_split_by_whom_they_are_for():
    found = by_tag(torch.tensor([1.0, 2.0, 3.0, 6.0]), [None, "a", None, "b"])
    assert {tag: (float(loss), samples) for tag, (loss, samples) in found.items()} == {
        None: (2.0, 2), "a": (2.0, 1), "b": (6.0, 1),
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="3 tags"):
        by_tag(torch.ones(2), [None] * 3)
    with pytest.raises(InvalidRequest, match="shape"):
        by_tag(torch.ones(2, 2), [None] * 2)
