from __future__ import annotations

import orjson
from typer.testing import CliRunner

from esper_servers.cli.bench import app
from esper_servers.cli.bench.optim import OptimBench


def test_every_figure_is_measured():
    result = CliRunner().invoke(app, ["optim", "--layers", "1", "--steps", "20", "--json"])
    assert result.exit_code == 0, result.output
    document = orjson.loads(result.stdout)
    assert document["parameters"] == 3_152_384
    figures = ["lr_step", "integrity", "add_parameters", "rebuild", "state_preserve", "widen_layer", "aggregate"]
    assert list(document["optim"]) == figures
    assert all(figure["p95_ms"] >= figure["p50_ms"] > 0 for figure in document["optim"].values())


def test_each_measurement_finds_what_the_one_before_it_found():
    bench = OptimBench(1)
    rates = bench.controller.rates
    for figure in (bench.add_parameters, bench.rebuild, bench.state_preserve, bench.widen_layer, bench.aggregate):
        figure()
        assert bench.controller.rates == rates
        assert bench.controller.violations == 0
