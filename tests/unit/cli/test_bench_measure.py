"""What the benchmarks make of what they measured."""

from __future__ import annotations

import random

import pytest

from esper_servers.cli.bench.measure import median_interval


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
