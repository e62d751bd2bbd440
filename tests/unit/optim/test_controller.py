from __future__ import annotations

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from esper_rpc.breaker import BreakerConfig
from esper_rpc.errors import ConfigError, InvalidRequest
from esper_rpc.proto.leyline.v1 import CircuitState
from esper_rpc.telemetry import events
from esper_rpc.telemetry.metrics import LEARNING_RATE_VIOLATIONS
from esper_rpc.testing import FakeClock
from esper_servers.optim.controller import LearningRateConfig, UnifiedLRController
from esper_servers.optim.rebuild import OptimizerChange
from esper_servers.optim.schedules import Adaptive, Constant, Cosine, Frozen, StepDecay, WarmUp


def sgd(*rates):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def found_in(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.fixture
def told():
    packets = []
    stop = events.listen(packets.append)
    yield lambda: [(event.description, dict(event.attributes)) for packet in packets for event in packet.events]
    stop()


def test_each_group_follows_its_own_schedule():
    optimizer = sgd(0.1, 0.2, 0.3)
    controller = UnifiedLRController(optimizer, schedule=[StepDecay(every=2), WarmUp(steps=2), Frozen()])
    seen = [found_in(optimizer)]
    for _ in range(3):
        controller.step()
        seen.append(found_in(optimizer))
    expected = [[0.1, 0.02, 0.0], [0.1, 0.11, 0.0], [0.01, 0.2, 0.0], [0.01, 0.2, 0.0]]
    assert [pytest.approx(row) for row in expected] == seen
    assert controller.rates == tuple(seen[-1])


def test_no_rate_falls_below_the_least_unless_it_was_there_already():
    optimizer = sgd(1.0, 1e-8)
    controller = UnifiedLRController(optimizer, schedule=StepDecay(every=1))
    for _ in range(30):
        controller.step()
    assert found_in(optimizer) == [1e-6, 1e-8]


def test_an_adaptive_group_falls_when_the_loss_does_not():
    optimizer = sgd(0.1, 0.2)
    controller = UnifiedLRController(optimizer, schedule=[Adaptive(patience=1), Constant()])
    for loss in (1.0, 1.0, math.nan):
        controller.observe(loss)
    assert found_in(optimizer) == pytest.approx([0.01, 0.2])


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_change_by_somebody_else_is_undone_counted_and_told(rate, told):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=rate, foreach=False)
    controller = UnifiedLRController(optimizer, schedule=Cosine(total_steps=10))
    before = LEARNING_RATE_VIOLATIONS.labels("outside_change")._value.get()
    controller.step()
    expected = found_in(optimizer)[0]
    if isinstance(rate, torch.Tensor):
        optimizer.param_groups[0]["lr"].mul_(0.5)
    else:
        optimizer.param_groups[0]["lr"] *= 0.5
    assert controller.check() == 1
    assert found_in(optimizer)[0] == pytest.approx(expected, rel=1e-6)
    assert controller.violations == 1
    assert LEARNING_RATE_VIOLATIONS.labels("outside_change")._value.get() == before + 1
    [(name, details)] = told()
    assert (name, details["reason"], details["group"]) == ("learning_rate_violation", "outside_change", "0")
    assert float(details["found"]) == pytest.approx(expected / 2)
    assert controller.check() == 0
    assert controller.history[-1].cause == "restored"


@pytest.mark.parametrize("broken", [math.nan, math.inf, None, -1.0])
def test_a_rate_that_is_none_is_put_back(broken):
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer)
    optimizer.param_groups[0]["lr"] = broken
    controller.step()
    assert found_in(optimizer) == [0.1]
    assert controller.violations == 1


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(base=st.floats(1e-3, 10.0), share=st.floats(-1e-5, 1e-5))
def test_what_rounding_may_do_is_no_change_and_more_is(base, share):
    optimizer = sgd(base)
    controller = UnifiedLRController(optimizer)
    optimizer.param_groups[0]["lr"] = changed = base * (1 + share)
    limit = max(1e-12, 1e-6 * max(changed, base))
    assert controller.check() == (abs(changed - base) > limit)


def test_the_scheduler_of_a_user_is_refused_at_the_start_and_has_no_effect_later(told):
    optimizer = sgd(0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ConfigError, match="scheduler drives this optimizer"):
        UnifiedLRController(optimizer)
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    controller.step()
    assert found_in(optimizer) == [0.1]
    assert told()[0][1]["reason"] == "scheduler_attached"


def test_three_changes_in_a_row_open_the_breaker_and_then_the_mesh_may_not_change_rates_either(told):
    clock = FakeClock()
    config = LearningRateConfig(breaker=BreakerConfig(failures=3, cool_down_seconds=60, successes=2))
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer, config=config, clock=clock)
    for _ in range(6):
        optimizer.param_groups[0]["lr"] = 0.5
        controller.step()
        assert found_in(optimizer) == [0.1]
    assert controller.is_conservative
    assert controller.violations == 6
    assert not controller.scale(0.5)
    names = [name for name, _ in told()]
    assert names == ["learning_rate_violation"] * 3 + ["breaker_moved"]
    assert told()[-1][1]["priority"] == "HIGH"
    clock.advance(61)
    for _ in range(2):
        controller.step()
    assert controller.breaker.state == CircuitState.CIRCUIT_STATE_CLOSED
    assert controller.scale(0.5)


def test_changes_with_quiet_steps_between_open_no_breaker():
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer)
    for step in range(12):
        if step % 3:
            optimizer.param_groups[0]["lr"] = 0.5
        controller.step()
    assert controller.violations == 8
    assert not controller.is_conservative


def test_the_multiplier_of_the_mesh_lies_on_top_of_schedules_within_limits_of_its_own():
    optimizer = sgd(0.1, 0.2)
    controller = UnifiedLRController(optimizer, schedule=[StepDecay(every=1, factor=0.5), Frozen()])
    assert controller.scale(2.0)
    assert found_in(optimizer) == pytest.approx([0.2, 0.0])
    controller.step()
    assert found_in(optimizer) == pytest.approx([0.1, 0.0])
    assert controller.scale(2.0)
    before = found_in(optimizer)
    assert not controller.scale(1.01)
    assert not controller.scale(math.nan)
    assert found_in(optimizer) == before
    assert not controller.scale(0.0001)


def test_the_last_thousand_changes_are_remembered_with_their_cause():
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer, schedule=Cosine(total_steps=5000))
    controller.scale(0.5)
    for _ in range(1500):
        controller.step()
    assert len(controller.history) == 1000
    assert {snapshot.cause for snapshot in controller.history} == {"schedule"}
    assert [after.step - before.step for before, after in pairwise(controller.history)] == [1] * 999
    assert controller.history[-1].rates == controller.rates


def test_what_joins_is_warmed_up_to_a_tenth_of_the_base_and_follows_the_schedule(make_model, train):
    model, seed = make_model(), nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = LearningRateConfig(epoch_steps=2, warm_up_epochs=5, warm_up_factor=0.01)
    controller = UnifiedLRController(optimizer, schedule=Cosine(total_steps=40), config=config)
    train(model, optimizer, 2, after=controller.step)
    controller.adopt(seed)
    assert controller.rates[1] == pytest.approx(controller.rates[0] * 0.1 * 0.01, rel=1e-3)
    train(model, optimizer, 5, through=[seed], after=controller.step)
    assert controller.rates[1] == pytest.approx(controller.rates[0] * 0.1 * (0.01 + 0.99 / 2), rel=1e-3)
    train(model, optimizer, 5, through=[seed], after=controller.step)
    assert controller.rates[1] == pytest.approx(controller.rates[0] * 0.1, rel=1e-3)
    assert found_in(optimizer) == list(controller.rates)
    assert controller.violations == 0


def test_what_joins_follows_the_first_group_that_learns(make_model):
    model, seed = make_model(), nn.Linear(4, 4)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "betas": (0.5, 0.6)}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    controller = UnifiedLRController(optimizer, schedule=[Frozen(), Constant()])
    controller.adopt(seed)
    for _ in range(10):
        controller.step()
    assert controller.rates == pytest.approx((0.0, 0.1, 0.01))
    assert optimizer.param_groups[2]["betas"] == (0.5, 0.6)


def test_where_the_whole_model_is_frozen_what_joins_learns_all_the_same():
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer, schedule=Frozen(), config=LearningRateConfig(warm_up_epochs=0))
    for _ in range(2):
        controller.adopt(nn.Linear(2, 2))
    assert controller.rates == pytest.approx((0.0, 0.01, 0.01))


def test_what_joins_falls_with_the_plateau_of_the_group_it_follows():
    optimizer, seed = sgd(0.1), nn.Linear(2, 2)
    config = LearningRateConfig(warm_up_epochs=0)
    controller = UnifiedLRController(optimizer, schedule=Adaptive(patience=0), config=config)
    controller.observe(1.0)
    controller.observe(1.0)
    controller.adopt(seed)
    assert controller.rates == pytest.approx((0.01, 0.001))
    controller.observe(1.0)
    assert controller.rates == pytest.approx((0.001, 0.0001))


def test_a_released_module_leaves_all_else_as_it_was(make_model, train, told):
    model, seeds = make_model(), [nn.Linear(4, 4), nn.Linear(4, 4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    controller = UnifiedLRController(optimizer)
    for seed in seeds:
        controller.adopt(seed)
    train(model, optimizer, 3, through=seeds, after=controller.step)
    rates, states = controller.rates, dict(optimizer.state)
    controller.release(seeds[0])
    assert controller.rates == (rates[0], rates[2])
    assert set(optimizer.state) == set(states) - set(seeds[0].parameters())
    assert all(optimizer.state[p] is states[p] for p in optimizer.state)
    controller.release(seeds[0])
    assert controller.rates == (rates[0], rates[2])
    train(model, optimizer, 3, through=seeds, after=controller.step)
    assert controller.violations == 0
    assert told() == []


def test_a_module_is_adopted_once_and_without_what_does_not_learn(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = UnifiedLRController(optimizer)
    still = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    for module in (still, model, model[0]):
        controller.adopt(module)
    assert len(optimizer.param_groups) == 1


def test_a_change_of_parameters_that_fails_leaves_rates_and_groups_as_they_were(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = UnifiedLRController(optimizer)
    before = controller.rates, found_in(optimizer)
    with pytest.raises(InvalidRequest):
        controller.rebuild(OptimizerChange(leaving=[nn.Parameter(torch.ones(1))]))
    assert (controller.rates, found_in(optimizer)) == before


def test_a_group_may_lose_its_first_parameter(make_model):
    model = make_model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}], lr=0.1
    )
    controller = UnifiedLRController(optimizer, schedule=[StepDecay(every=1), Constant()])
    controller.rebuild(OptimizerChange(leaving=[model[0].weight]))
    controller.step()
    assert controller.rates == pytest.approx((0.03, 0.1))


def test_a_group_of_the_user_that_comes_later_keeps_its_rate_under_the_controller(told):
    optimizer = sgd(0.1)
    controller = UnifiedLRController(optimizer, schedule=StepDecay(every=1))
    controller.scale(0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.4})
    controller.step()
    assert controller.rates == pytest.approx((0.005, 0.4))
    assert told()[0][0] == "learning_rate_group_found"
    controller.scale(0.5)
    assert controller.rates == pytest.approx((0.0025, 0.2))


SCHEDULES = {
    "warm_up_then_cosine": WarmUp(steps=3, then=Cosine(total_steps=20)),
    "step": StepDecay(every=4),
    "adaptive": Adaptive(patience=1, factor=0.5),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_run_resumes_bit_equal(schedule, make_model, train):
    def start(seed_weights=None):
        model, seed = make_model(), nn.Linear(4, 4)
        if seed_weights:
            seed.load_state_dict(seed_weights)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, seed, optimizer, UnifiedLRController(optimizer, schedule=schedule)

    def go_on(model, seed, optimizer, controller, first):
        seen = []

        def after():
            controller.observe(1.0)
            controller.step()
            seen.append(controller.rates)

        train(model, optimizer, 6, through=[seed], after=after, first=first)
        return seen, [p.detach().clone() for p in (*model.parameters(), *seed.parameters())]

    one = start()
    one[3].adopt(one[1])
    one[3].scale(0.7)
    go_on(*one, first=0)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in one], file)
    file.seek(0)
    model, seed, optimizer, controller = torch.load(file, weights_only=True)
    other = start(seed)
    other[3].adopt(other[1])
    other[0].load_state_dict(model)
    other[3].load_state_dict(controller)
    other[2].load_state_dict(optimizer)
    rates, weights = go_on(*one, first=6)
    again, their_weights = go_on(*other, first=6)
    assert rates == again
    assert all(torch.equal(a, b) for a, b in zip(weights, their_weights, strict=True))
    assert other[3].violations == 0


def test_the_state_of_other_groups_is_refused_and_changes_nothing():
    one, other = UnifiedLRController(sgd(0.1, 0.2)), UnifiedLRController(sgd(0.3))
    before = copy.deepcopy(other.state_dict()), other.rates
    with pytest.raises(InvalidRequest, match="2 groups"):
        other.load_state_dict(one.state_dict())
    assert (other.state_dict(), other.rates) == before


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"optimizer_lr": 0.1, "optimizer_momentum": 0.9}),
        (lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9)), {"optimizer_lr": 0.1, "optimizer_momentum": 0.8}),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), {"optimizer_lr": 0.1}),
    ],
)
def test_rate_and_momentum_are_told(optimizer, expected):
    assert UnifiedLRController(optimizer([nn.Parameter(torch.ones(1))])).metrics() == expected


def test_as_many_schedules_as_groups_or_one_for_all():
    with pytest.raises(ConfigError, match="2 schedules for 1 groups"):
        UnifiedLRController(sgd(0.1), schedule=[Constant(), Constant()])
    with pytest.raises(ConfigError, match="has no learning rate"):
        optimizer = sgd(0.1)
        optimizer.param_groups[0]["lr"] = None
        UnifiedLRController(optimizer)
