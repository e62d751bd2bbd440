from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.blending import BLENDING_METHODS
from esper_rpc.proto.leyline.v1 import AdaptationCommand
from esper_servers.kasmina.blending.alpha import AlphaSchedule, schedule_of

fraction = st.floats(0, 1)


@given(st.sampled_from(BLENDING_METHODS), fraction, fraction, st.integers(1, 50))
def test_alpha_rises_from_zero_to_exactly_one_whatever_the_window(method, a, b, steps):
    schedule = AlphaSchedule(method=method, start=min(a, b), end=max(a, b), total_steps=steps)
    values = [schedule.advance() for _ in range(schedule.total_steps)]
    assert values == sorted(values)
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[-1] == 1.0


@pytest.mark.parametrize("method", BLENDING_METHODS)
def test_alpha_stays_zero_until_the_window_opens(method):
    schedule = AlphaSchedule(method=method, start=0.5, end=1.0)
    values = [schedule.advance() for _ in range(20)]
    assert values[:10] == [0.0] * 10
    assert values[10] > 0.0


def test_the_curves_differ():
    at_a_quarter = {
        method: [AlphaSchedule(method=method, step=5).value(), AlphaSchedule(method=method, step=12).value()]
        for method in BLENDING_METHODS
    }
    assert len({tuple(values) for values in at_a_quarter.values()}) == len(BLENDING_METHODS)


def logistic(x):
    return 1 / (1 + math.exp(-(x - 0.5) * 2.0 * 2 * math.pi))


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("linear", lambda x: x),
        ("cosine", lambda x: (1 - math.cos(math.pi * x)) / 2),
        ("warmup_hold", lambda x: min(1.0, 2 * x)),
        # Of temperature 2, stretched to begin at 0 and to end at 1.
        ("sigmoid", lambda x: (logistic(x) - logistic(0)) / (logistic(1) - logistic(0))),
    ],
)
def test_alpha_follows_its_curve_in_twenty_steps(method, rule):
    schedule = AlphaSchedule(method=method)
    assert [schedule.advance() for _ in range(20)] == pytest.approx([rule(step / 20) for step in range(1, 21)])


@pytest.mark.parametrize(
    ("start", "end", "window"),
    [(0.2, 0.8, (0.2, 0.8)), (0.8, 0.2, (0.2, 0.8)), (-1.0, 7.0, (0.0, 1.0))],
    ids=["as asked", "swapped", "out of range"],
)
def test_a_schedule_pair_is_clamped_and_ordered(start, end, window):
    command = AdaptationCommand()
    command.seed_operation.parameters.update({"blending_schedule_start": start, "blending_schedule_end": end})
    schedule = schedule_of(command)
    assert (schedule.start, schedule.end) == pytest.approx(window)


@pytest.mark.parametrize(("index", "method"), [(2, "warmup_hold"), (99, "linear"), (-1, "linear")])
def test_an_unknown_method_is_linear(index, method):
    command = AdaptationCommand()
    command.seed_operation.parameters["blending_method_index"] = index
    assert schedule_of(command).method == method
