from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from esper_rpc.errors import ConfigError
from esper_servers.optim.plateau import Plateau
from esper_servers.optim.schedules import Adaptive, Constant, Cosine, Frozen, StepDecay, WarmUp, adaptive_of

LAW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
BASES = st.floats(1e-5, 10.0)
STEPS = st.integers(0, 10**6)
LENGTHS = st.integers(1, 10**5)
SIMPLE = st.one_of(
    st.just(Constant()),
    st.builds(Cosine, total_steps=LENGTHS),
    st.builds(StepDecay, every=LENGTHS, factor=st.floats(0.01, 1.0)),
)
SCHEDULES = SIMPLE | st.builds(WarmUp, steps=LENGTHS, factor=st.floats(0.0, 1.0), then=SIMPLE)


def rates_of_torch(make, base, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        # SequentialLR passes its own argument in a way that torch warns about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    return rates


def then(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=7),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-6),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[7])


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0), 20),
        (Cosine(total_steps=40), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=1e-6), 41),
        (StepDecay(every=6, factor=0.5), lambda o: lr_scheduler.StepLR(o, step_size=6, gamma=0.5), 40),
        (WarmUp(steps=12), lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=12), 30),
        (WarmUp(steps=7, then=Cosine(total_steps=20)), then, 27),
    ],
    ids=["constant", "cosine", "step", "warm_up", "warm_up_then_cosine"],
)
def test_a_schedule_gives_what_torch_gives(ours, theirs, steps):
    expected = rates_of_torch(theirs, 0.3, steps)
    assert [ours.rate(0.3, step) for step in range(steps)] == pytest.approx(expected, rel=1e-9)


@LAW
@given(
    losses=st.lists(st.floats(0.0, 10.0) | st.just(math.nan), max_size=80), patience=st.integers(0, 4),
    cool_down=st.integers(0, 3), threshold=st.floats(0.0, 0.5),
)  # fmt: skip
def test_an_adaptive_schedule_falls_when_that_of_torch_does(losses, patience, cool_down, threshold):
    schedule = Adaptive(factor=0.5, patience=patience, cool_down=cool_down, threshold=threshold)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e20)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, cooldown=cool_down, threshold=threshold
    )
    remembered = Plateau()
    for loss in losses:
        theirs.step(loss)
        remembered = remembered.after(loss, schedule)
        assert 1e20 * remembered.share == optimizer.param_groups[0]["lr"]


@LAW
@given(schedule=SCHEDULES, base=BASES, step=STEPS)
def test_a_rate_follows_from_the_step_alone_and_lies_between_nothing_and_the_base(schedule, base, step):
    rate = schedule.rate(base, step)
    assert rate == schedule.rate(base, step)
    assert 0.0 <= rate <= base


@LAW
@given(schedule=SIMPLE, base=BASES, step=STEPS)
def test_without_a_warm_up_a_rate_never_rises(schedule, base, step):
    assert schedule.rate(base, step + 1) <= schedule.rate(base, step)


@LAW
@given(steps=LENGTHS, factor=st.floats(0.0, 1.0), base=BASES, step=STEPS)
def test_a_warm_up_never_falls_begins_at_its_factor_and_ends_at_the_base(steps, factor, base, step):
    schedule = WarmUp(steps=steps, factor=factor)
    assert schedule.rate(base, step) <= schedule.rate(base, step + 1)
    assert schedule.rate(base, 0) == pytest.approx(factor * base)
    assert schedule.rate(base, steps) == base


@LAW
@given(total=LENGTHS, base=BASES, beyond=STEPS)
def test_a_cosine_ends_at_its_least_rate_and_stays_there(total, base, beyond):
    assert Cosine(total_steps=total).rate(base, total + beyond) == min(base, 1e-6)


def test_a_warm_up_of_no_steps_is_none():
    assert WarmUp(steps=0).rate(0.1, 0) == 0.1


def test_what_is_frozen_does_not_learn():
    assert Frozen().rate(0.1, 5) == 0.0


def test_the_adaptive_part_of_a_schedule_is_found_behind_a_warm_up():
    adaptive = Adaptive()
    assert adaptive_of(WarmUp(steps=2, then=adaptive)) is adaptive
    assert adaptive_of(WarmUp(steps=2)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(total_steps=0), lambda: StepDecay(every=0), lambda: StepDecay(every=1, factor=1.5),
        lambda: WarmUp(steps=-1), lambda: WarmUp(steps=1, factor=math.nan), lambda: Adaptive(patience=-1),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ConfigError, match="out of range"):
        make()
