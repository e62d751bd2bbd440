from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor, cli_command

from .measure import at_once, machine, percentiles, rss_mb, scratch_home, show
from .served_plan import COMPILED, PlanOption, serving_plan
from .step import GUARD_MS, StepBench
from .urza import seed

WINDOWS = 20


def soak(
    context: typer.Context,
    steps: Annotated[int, typer.Option(min=2000, help="How many steps.")] = 1_000_000,
    plan: PlanOption = COMPILED,
    control: Annotated[bool, typer.Option(help="In the end compare with a mesh that was just started.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Step for a long time, and see whether memory or latency creeps.

    Growth and drift compare the last of 20 windows with the second: the first one warms up. A machine is not equally
    fast for an hour, so the control takes a window's steps in new processes, and then as many again in the old ones.
    """
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ_of(context))) as supervisor:
            soaked = _Soaked(home, supervisor.addresses["tamiyo"], supervisor.services["tamiyo"].process.pid)
            document = measure(soaked, steps, (lambda: _fresh(steps, plan)) if control else None)
    show("soak", document | {"steps": steps, "machine": machine()}, as_json=as_json)


class _Soaked:
    """A mesh and a trainer that grow old together."""

    def __init__(self, home: Home, tamiyo: str, pid: int) -> None:
        self._home = home
        self._pid = pid
        self.bench = StepBench(home, tamiyo, GUARD_MS)

    def window(self, steps: int) -> dict[str, float]:
        """Take steps; returns their latencies, and the sizes of both processes after them."""
        latencies = percentiles(self.bench.latencies(steps, at_once))
        sizes = {"tamiyo_rss_mb": rss_mb(self._pid), "trainer_rss_mb": rss_mb("self")}
        return sizes | {"journal_mb": _journal_mb(self._home)} | latencies


def measure(soaked: _Soaked, steps: int, control: Callable[[], dict[str, float]] | None) -> dict[str, Any]:
    """Return a row for every window, and what changed between them."""
    begun, size = time.perf_counter(), steps // WINDOWS
    with soaked.bench.session:
        rows = [soaked.window(size) for _ in range(WINDOWS)]
        minutes = (time.perf_counter() - begun) / 60
        controlled = _controlled(soaked, size, rows[-1], control) if control is not None else {}
    first, last = rows[1], rows[-1]
    return {
        "tamiyo_rss_growth": _growth(first, last, "tamiyo_rss_mb"),
        "trainer_rss_growth": _growth(first, last, "trainer_rss_mb"),
        "p95_drift": _growth(first, last, "p95_ms"),
        **controlled,
        "minutes": round(minutes, 1),
        "answers": dict(soaked.bench.session.reasons),
        "windows": rows,
    }


def _controlled(
    soaked: _Soaked, size: int, last: dict[str, float], control: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Old, new, old: what differs then is not the hour."""
    fresh, after = control(), soaked.window(size)
    old_p95 = (last["p95_ms"] + after["p95_ms"]) / 2
    return {"p95_over_fresh": round(old_p95 / fresh["p95_ms"] - 1, 4), "fresh": fresh, "after_fresh": after}


def _fresh(steps: int, plan: str) -> dict[str, float]:
    """The medians of the windows of a soak in processes of its own, without the first."""
    size = str(max(2000, steps // WINDOWS))
    command = [*cli_command(), "bench", "soak", "--steps", size, "--plan", plan, "--no-control", "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    windows = json.loads(found)["windows"][1:]
    return {key: statistics.median(window[key] for window in windows) for key in ("p50_ms", "p95_ms", "p99_ms")}


def _growth(first: dict[str, float], last: dict[str, float], key: str) -> float:
    return round(last[key] / first[key] - 1, 4)


def _journal_mb(home: Home) -> float:
    """The journal keeps what was decided up to a bound, 2 GiB by default."""
    files = home.state_dir("tamiyo").glob("journal.sqlite*")
    return round(sum(file.stat().st_size for file in files) / 2**20, 1)
