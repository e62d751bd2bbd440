"""Whatever happens to a controller in whatever order, what it promises holds."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from esper_servers.optim.controller import LearningRateConfig, UnifiedLRController
from esper_servers.optim.schedules import Adaptive, Constant, Cosine, Frozen, StepDecay, WarmUp

BASES = (0.1, 0.02)
SEEDS = 3
SCHEDULES = (
    [Constant(), Frozen()],
    [WarmUp(steps=4, then=Cosine(total_steps=12)), StepDecay(every=3)],
    [Adaptive(patience=1), WarmUp(steps=3, then=Adaptive(patience=0, factor=0.5))],
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("adopt"), st.integers(0, SEEDS - 1)),
        st.tuples(st.just("release"), st.integers(0, SEEDS - 1)),
        st.tuples(st.just("scale"), st.floats(0.1, 2.0)),
        st.tuples(st.just("observe"), st.floats(0.0, 2.0) | st.just(math.nan)),
        st.tuples(st.just("meddle"), st.floats(0.0, 1.0)),
    ),
    max_size=25,
)


class Scene:
    def __init__(self, schedules):
        groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": base} for base in BASES]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.controller = UnifiedLRController(
            self.optimizer, schedule=schedules, config=LearningRateConfig(warm_up_epochs=3)
        )
        self.seeds = [nn.Linear(2, 2) for _ in range(SEEDS)]
        self.joined = []
        self.meddled = 0

    def do(self, name, value):
        if name == "step":
            for _ in range(value):
                self.controller.step()
        elif name == "adopt":
            self.controller.adopt(self.seeds[value])
            self.joined += [value] if value not in self.joined else []
        elif name == "release":
            self.controller.release(self.seeds[value])
            self.joined = [each for each in self.joined if each != value]
        elif name == "scale":
            self.controller.scale(value)
        elif name == "observe":
            self.controller.observe(value)
        else:
            self.meddle(value)

    def meddle(self, rate):
        group = self.optimizer.param_groups[-1]
        self.meddled += not math.isclose(rate, group["lr"], rel_tol=1e-6, abs_tol=1e-12)
        group["lr"] = rate
        self.controller.check()

    def rates(self):
        return tuple(group["lr"] for group in self.optimizer.param_groups)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(schedules=st.sampled_from(SCHEDULES), operations=OPERATIONS)
def test_rates_are_the_controllers_within_their_bounds_and_a_resume_goes_on_with_the_same(schedules, operations):
    scene = Scene(schedules)
    for operation in operations:
        scene.do(*operation)
        assert scene.rates() == scene.controller.rates
        assert len(scene.rates()) == len(BASES) + len(scene.joined)
        for rate, base in zip(scene.rates(), [*BASES, *[BASES[0] * 0.1] * len(scene.joined)], strict=True):
            assert rate == 0.0 or 1e-6 <= rate <= base * scene.controller.total * (1 + 1e-9)
    assert scene.controller.violations == scene.meddled
    assert 0.01 <= scene.controller.total <= 4.0

    other = Scene(schedules)
    for seed in scene.joined:
        other.do("adopt", seed)
    other.controller.load_state_dict(scene.controller.state_dict())
    assert other.rates() == scene.rates()
    for _ in range(5):
        scene.do("step", 1)
        other.do("step", 1)
        assert other.rates() == scene.rates()
