"""The benchmarks against a Tamiyo that runs; what they find is not judged here."""

from __future__ import annotations

import asyncio
import os

import pytest

from esper_servers.cli.bench import growth
from esper_servers.cli.bench.growth import Size
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("mesh"))
    home.prepare()
    with Supervisor(home, os.environ) as supervisor:
        yield supervisor


def test_growth_tells_the_parts_of_a_step_and_the_graph_of_each_size(mesh):
    axes = {"seeds": (Size(seeds=6),), "runs": (Size(runs=3),)}
    found = asyncio.run(growth.measure(mesh.home, mesh.addresses["tamiyo"], axes))
    [six], [three] = found["seeds"], found["runs"]
    assert (six["seeds"], three["runs"], six["plan"]) == (6, 3, "eager")
    assert six["nodes"] == three["nodes"] + 2
    for row in (six, three):
        assert all(0 <= row[part]["p50_ms"] <= row["total"]["p50_ms"] for part in growth.PARTS)
        assert row["inference"]["p50_ms"] > 0
        assert row["open_run"]["p95_ms"] >= row["open_run"]["p50_ms"] > 0
        assert row["first_step"]["p50_ms"] > 0
