from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_servers.tamiyo.turns.turn_cost import TurnCost


def learned(*turns, times=400):
    cost = TurnCost(0.002)
    for _ in range(times):
        for size, seconds in turns:
            cost.learn(size, seconds)
    return cost


def test_until_a_shared_turn_was_measured_sharing_is_taken_to_save_nothing():
    assert TurnCost(0.002).of(4) == pytest.approx(0.008)
    assert learned((1, 0.001)).of(4) == pytest.approx(0.004)


def test_sizes_never_measured_lie_on_the_line_through_those_that_were():
    cost = learned((1, 0.002), (4, 0.005))
    assert [cost.of(size) for size in (1, 2, 4, 8)] == pytest.approx([0.002, 0.003, 0.005, 0.009], rel=0.02)


def test_one_size_that_is_met_again_and_again_is_predicted_as_it_is():
    assert learned((8, 0.01)).of(8) == pytest.approx(0.01, rel=0.01)


def test_a_machine_that_becomes_slower_is_slower_for_every_size():
    cost = learned((1, 0.002), (4, 0.005))
    for _ in range(400):
        cost.learn(1, 0.004)
    assert [cost.of(1), cost.of(4)] == pytest.approx([0.004, 0.010], rel=0.05)


def test_a_clock_that_stands_still_breaks_nothing():
    assert learned((1, 0.0), (3, 0.0), times=2000).of(5) >= 0.0


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), max_size=100))
def test_whatever_was_measured_each_further_one_costs_something_between_nothing_and_a_turn_of_its_own(turns):
    cost = TurnCost(0.002)
    for size, seconds in turns:
        cost.learn(size, seconds)
        assert 0.0 <= cost.further <= cost.first * (1 + 1e-9)
