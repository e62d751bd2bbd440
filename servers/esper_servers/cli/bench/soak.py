from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from esper_servers.cli.console import JsonOption, environ_of
from esper_servers.cli.home import Home
from esper_servers.cli.processes import Supervisor

from .measure import at_once, machine, percentiles, rss_mb, scratch_home, show
from .served_plan import COMPILED, PlanOption, serving_plan
from .step import GUARD_MS, StepBench
from .urza import seed

WINDOWS = 20


def soak(
    context: typer.Context,
    steps: Annotated[int, typer.Option(min=2000, help="How many steps.")] = 1_000_000,
    plan: PlanOption = COMPILED,
    as_json: JsonOption = False,
) -> None:
    """Step for a long time, and see whether memory or latency creeps.

    Growth and drift compare the last of 20 windows with the second: the first one warms up.
    """
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, serving_plan(plan, home, environ_of(context))) as supervisor:
            pid = supervisor.services["tamiyo"].process.pid
            document = measure(home, supervisor.addresses["tamiyo"], pid, steps)
    show("soak", document | {"steps": steps, "machine": machine()}, as_json=as_json)


def measure(home: Home, tamiyo: str, pid: int, steps: int) -> dict[str, Any]:
    """Return a row for every window, and what changed between them."""
    bench = StepBench(home, tamiyo, GUARD_MS)
    begun, rows = time.perf_counter(), []
    with bench.session:
        for _ in range(WINDOWS):
            latencies = percentiles(bench.latencies(steps // WINDOWS, at_once))
            sizes = {"tamiyo_rss_mb": rss_mb(pid), "trainer_rss_mb": rss_mb("self"), "journal_mb": _journal_mb(home)}
            rows.append(sizes | latencies)
    first, last = rows[1], rows[-1]
    return {
        "tamiyo_rss_growth": round(last["tamiyo_rss_mb"] / first["tamiyo_rss_mb"] - 1, 4),
        "trainer_rss_growth": round(last["trainer_rss_mb"] / first["trainer_rss_mb"] - 1, 4),
        "p95_drift": round(last["p95_ms"] / first["p95_ms"] - 1, 4),
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "answers": dict(bench.session.reasons),
        "windows": rows,
    }


def _journal_mb(home: Home) -> float:
    """The journal keeps what was decided up to a bound, 2 GiB by default."""
    files = home.state_dir("tamiyo").glob("journal.sqlite*")
    return round(sum(file.stat().st_size for file in files) / 2**20, 1)
