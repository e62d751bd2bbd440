"""The benchmarks of a seed host; what they find is not judged here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from esper_servers.cli.bench import app
from esper_servers.cli.bench.apply import HostBench
from esper_servers.cli.bench.germinate import WINDOWS, _summary
from esper_servers.cli.bench.measure import scratch_home


def run(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_germinations_are_measured_by_windows_of_seeds():
    document = run("germinate", "--seeds", "16")
    for kind in ("beside", "in_turn"):
        windows = document[kind]["windows"]
        assert [window["to_seed"] for window in windows] == list(range(2, 17, 2))
        assert document[kind]["p95_ratio"] == pytest.approx(windows[-1]["p95_ms"] / windows[0]["p95_ms"], abs=1e-3)
        assert document[kind]["p50_ms"] > 0
    cached = document["cached_kernel"]
    assert 0 < cached["p50_ms"] <= cached["p95_ms"] <= cached["max_ms"]


def test_a_host_that_is_measured_among_nonces_remembers_them():
    with scratch_home() as home:
        bench = HostBench(home)
        bench.remember(30)
        assert bench.host.verifier.remembered_nonces() == 30
        assert bench.apply("GERMINATE") > 0


def test_every_seed_is_in_one_window():
    for count in (WINDOWS, 2_000, 2_001):
        windows = _summary([1.0] * count)["windows"]
        assert len(windows) == WINDOWS
        assert windows[-1]["to_seed"] == count
