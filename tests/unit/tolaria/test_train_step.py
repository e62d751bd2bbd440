"""Forward, backward and optimizer of a step."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from prometheus_client import REGISTRY
from torch import nn

from esper_rpc.errors import ConfigError
from esper_servers.tolaria.aggregation.aggregator import AggregationConfig
from esper_servers.tolaria.aggregation.batches import BatchAggregator
from esper_servers.tolaria.train_step import TrainStep, TrainStepConfig

KEEP = AggregationConfig(conflict="keep")


class Pair(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batch_of(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator)


def loss_of(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def state_of(model):
    return [each.detach().clone() for each in model.parameters()]


def are_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_is_what_a_plain_loop_does_bit_for_bit():
    plain, stepped = build(), build()
    optimizer = sgd(plain)
    step = TrainStep(stepped, sgd(stepped), loss_of)
    for seed in range(5):
        optimizer.zero_grad()
        loss = loss_of(plain, batch_of(seed))
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 10.0)
        optimizer.step()
        assert step(batch_of(seed)).loss == loss.item()
    assert are_equal(state_of(plain), state_of(stepped))


def test_accumulated_batches_are_one_large_one():
    one, several = build(), build()
    whole = [torch.cat(parts) for parts in zip(*(batch_of(seed) for seed in range(4)), strict=True)]
    together = TrainStep(one, sgd(one), loss_of)(whole)
    apart = TrainStep(several, sgd(several), loss_of)(*(batch_of(seed) for seed in range(4)))
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    assert apart.gradient_norm == pytest.approx(together.gradient_norm, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state_of(one), state_of(several), strict=True))


def test_the_gradient_is_clipped_and_its_norm_told_as_it_was():
    model = build()
    before = state_of(model)
    step = TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=1.0), lambda m, b: 1e4 * loss_of(m, b),
        config=TrainStepConfig(max_gradient_norm=0.5),
    )  # fmt: skip
    result = step(batch_of(0))
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, state_of(model), strict=True)))
    assert result.gradient_norm > 100
    assert moved == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision):
    model = build()
    optimizer = sgd(model)
    step = TrainStep(model, optimizer, loss_of, config=TrainStepConfig(precision=precision))
    step(batch_of(0))
    before, momentum = state_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    inputs, labels = batch_of(1)
    result = step((inputs * math.inf, labels))
    assert not result.has_updated
    assert not math.isfinite(result.gradient_norm)
    assert are_equal(before, state_of(model))
    for index, saved in momentum.items():
        assert torch.equal(saved["momentum_buffer"], optimizer.state_dict()["state"][index]["momentum_buffer"])
    assert step(batch_of(2)).has_updated


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_trains_weights_that_keep_their_precision(precision):
    model = build()
    seen = []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    step = TrainStep(model, sgd(model), loss_of, config=TrainStepConfig(precision=precision))
    losses = [step(batch_of(0)).loss for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert set(seen) == {getattr(torch, precision)}
    assert {each.dtype for each in model.parameters()} == {torch.float32}


def test_the_loss_is_told_before_the_last_backward_pass():
    model = build()
    told = []

    def on_loss(value):
        told.append((value, [None if each.grad is None else each.grad.clone() for each in model.parameters()]))

    result = TrainStep(model, sgd(model), loss_of)(batch_of(0), on_loss=on_loss)
    [(value, gradients)] = told
    assert value == result.loss
    assert gradients == [None] * len(gradients)


def test_what_cannot_be_compiled_runs_eagerly(monkeypatch, told):
    def broken(_model):
        def call(*_args, **_kwargs):
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, plain = build(), build()
    step = TrainStep(model, sgd(model), loss_of, config=TrainStepConfig(compile=True))
    assert step.is_compiled
    assert step(batch_of(0)).loss == TrainStep(plain, sgd(plain), loss_of)(batch_of(0)).loss
    assert not step.is_compiled
    assert are_equal(state_of(model), state_of(plain))
    assert [name for name, _ in told] == ["tolaria.compile_enabled", "tolaria.compile_fallback"]
    assert "no compiler here" in told[1][1]["error"]


def test_the_users_own_error_is_the_users_also_when_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = build()

    def raising(_model, _batch):
        raise KeyError("label")

    step = TrainStep(model, sgd(model), raising, config=TrainStepConfig(compile=True))
    with pytest.raises(KeyError, match="label"):
        step(batch_of(0))
    assert step.is_compiled, "the compiler is not to blame"


@pytest.mark.parametrize(
    "shape", [list, tuple, lambda parts: Pair(*parts), lambda parts: {"x": parts[0], "y": parts[1]}]
)
def test_a_batch_keeps_its_form(shape):
    def read(model, batch):
        inputs, labels = batch.values() if isinstance(batch, dict) else batch
        assert type(batch) is type(shape(batch_of(0)))
        return loss_of(model, (inputs, labels))

    model = build()
    assert TrainStep(model, sgd(model), read)(shape(batch_of(0))).has_updated


def test_bad_settings_say_what_may_be_chosen():
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        TrainStepConfig(precision="int8")
    with pytest.raises(ConfigError):
        TrainStepConfig(max_gradient_norm=0)
    model = build()
    with pytest.raises(ValueError, match="no batch"):
        TrainStep(model, sgd(model), loss_of)()


class Guest(nn.Module):
    """A model with a part that the optimizer does not know, as a seed is."""

    def __init__(self):
        super().__init__()
        self.host, self.seed = nn.Linear(4, 1, bias=False), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.host(x) + self.seed


def test_batches_that_agree_are_accumulated_as_ever():
    plain, aggregated = build(), build()
    batches = [batch_of(seed) for seed in range(3)]
    for _ in range(3):
        one = TrainStep(plain, sgd(plain), loss_of)(*batches)
        other = TrainStep(aggregated, sgd(aggregated), loss_of, batches=BatchAggregator(KEEP))(*batches)
    assert other.loss == one.loss
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state_of(plain), state_of(aggregated), strict=True))


def test_batches_that_pull_against_each_other_are_projected_and_a_seed_learns_from_all():
    model = Guest()
    optimizer = torch.optim.SGD(model.host.parameters(), lr=1.0)
    start = model.host.weight.detach().clone()
    aggregator = BatchAggregator()
    step = TrainStep(model, optimizer, lambda m, batch: m(batch).mean(), batches=aggregator)
    with_one, against = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[-1.0, 0.5, 0, 0]])
    result = step(with_one, against)
    # Of the second what lies across the first is left, and both count half.
    moved = start - model.host.weight.detach()
    assert torch.allclose(moved, torch.tensor([[0.5, 0.25, 0.0, 0.0]]), atol=1e-6)
    assert aggregator.rate.metrics() == {"grad_conflict_rate": 1.0}
    assert result.gradient_norm == pytest.approx(math.hypot(0.5, 0.25))
    assert model.seed.grad == pytest.approx(1.0)


def test_a_batch_whose_gradient_is_no_number_is_left_out():
    model = Guest()
    step = TrainStep(
        model, torch.optim.SGD(model.host.parameters(), lr=1.0), lambda m, batch: m(batch).mean(),
        batches=BatchAggregator(),
    )  # fmt: skip
    result = step(torch.full((1, 4), math.inf), torch.ones(1, 4))
    assert result.has_updated
    assert torch.isfinite(model.host.weight).all()


def test_scaled_gradients_are_not_aggregated():
    model = build()
    with pytest.raises(ConfigError, match="bfloat16"):
        TrainStep(
            model, sgd(model), loss_of, config=TrainStepConfig(precision="float16"), batches=BatchAggregator()
        )  # fmt: skip


@pytest.mark.parametrize(("precision", "shown"), [("float32", 0.0), ("bfloat16", 1.0)])
def test_whether_it_runs_under_autocast_is_shown(precision, shown):
    model = build()
    TrainStep(model, sgd(model), loss_of, config=TrainStepConfig(precision=precision))
    found = REGISTRY.get_sample_value("esper_tolaria_train_amp_enabled")
    assert found == shown


@pytest.mark.parametrize(("precision", "scale"), [("float32", 1.0), ("bfloat16", 1.0), ("float16", 2.0**16)])
def test_the_loss_is_scaled_in_float16_alone_and_gradients_are_unscaled_before_they_are_measured(precision, scale):
    model = build()
    step = TrainStep(model, sgd(model), loss_of, config=TrainStepConfig(precision=precision))
    found = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: found.append(each.grad.clone()))
    result = step(batch_of(0))
    norm = float(torch.cat([each.flatten() for each in found]).norm())
    assert result.has_updated
    assert norm == pytest.approx(scale * result.gradient_norm, rel=1e-4)
