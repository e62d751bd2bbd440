from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from esper_servers.cli.bench.growth_plot import draw
from esper_servers.cli.bench.scene import BenchHost
from esper_servers.cli.bench.step import unary_opening, unary_step
from esper_servers.cli.home import Home
from esper_servers.tamiyo.run_state import build_graph

PARTS = ("open_run", "first_step", "validate", "features", "inference", "risk", "total")


@pytest.fixture
def home(tmp_path):
    place = Home(tmp_path / "home")
    place.prepare()
    return place


@pytest.mark.parametrize(("layers", "seeds"), [(24, 4), (100, 4), (24, 100), (3, 7)])
def test_the_host_of_the_benchmarks_describes_as_many_layers_and_seeds_as_asked(home, layers, seeds):
    host = BenchHost(home, layers=layers, seeds=seeds)
    graph = build_graph(unary_opening(host), [])
    packet = unary_step(host, 1, []).packet
    graph.fill(packet)
    assert (graph.counts["layer"], graph.counts["seed"]) == (layers, seeds)
    assert [state.seed_id for state in packet.seed_states] == graph.seed_ids
    assert graph.coverage().types["edges.seed_monitors"] == 1.0


def _rows(axis, sizes, cost_ms):
    parts = {part: {"p50_ms": cost_ms, "p95_ms": 2 * cost_ms} for part in PARTS}
    return {axis: [{axis: size} | parts for size in sizes]}


def test_the_plot_of_growth_has_a_panel_an_axis_and_is_the_same_file_for_the_same_figures(tmp_path):
    rows = _rows("runs", (1, 64), 1.0) | _rows("seeds", (4, 100), 2.0) | _rows("layers", (24, 1000), 3.0)
    draw(tmp_path / "plots" / "growth.svg", rows, "eager")
    draw(tmp_path / "again.svg", rows, "eager")
    drawn = (tmp_path / "plots" / "growth.svg").read_bytes()
    assert drawn == (tmp_path / "again.svg").read_bytes()
    texts = {text.strip() for text in ET.fromstring(drawn).itertext()}
    assert texts >= {"With runs, eager plan", "With seeds, eager plan", "With layers, eager plan", "64", "100", "1000"}
    assert texts >= {"total", "inference", "risk", "features", "open_run"}
