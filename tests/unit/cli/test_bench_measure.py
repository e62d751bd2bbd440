"""What the benchmarks make of what they measured."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from esper_servers.cli.bench.measure import in_turn, median_interval, rounds_for


@pytest.mark.parametrize(
    ("count", "left_out"),
    # The table of the sign test at 2.5 % on each side.
    [(1, 0), (2, 0), (8, 0), (9, 1), (12, 2), (20, 5), (25, 7), (50, 17), (2000, 955)],
)
def test_at_each_end_it_leaves_out_what_the_table_says(count, left_out):
    values = [float(value) for value in range(count)]
    random.Random(1).shuffle(values)
    assert median_interval(values) == (left_out, count - 1 - left_out)


def test_nineteen_times_in_twenty_it_holds_the_median():
    draw = random.Random(2)
    held = 0
    for _ in range(400):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(25)])
        held += low <= 0.6931 <= high
    assert held / 400 >= 0.93


def test_each_kind_is_as_often_at_each_place_and_before_each_other():
    rounds = [in_turn("abcd", turn) for turn in range(8)]
    places = Counter((kind, place) for order in rounds for place, kind in enumerate(order))
    assert set(places.values()) == {2}
    assert {frozenset(order) for order in rounds} == {frozenset("abcd")}


def test_rounds_go_on_until_the_time_is_over_and_there_are_enough():
    ticks = iter(range(100))
    assert list(rounds_for(0, least=8, clock=ticks.__next__)) == list(range(8))
    # It looks at the clock once there are enough.
    assert list(rounds_for(20, least=8, clock=ticks.__next__)) == list(range(7 + 20))
