from __future__ import annotations

import time
from typing import Any

import typer

from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.plan import without_plan
from esper_servers.cli.processes import Supervisor
from esper_servers.cli.status import collect

from .measure import machine, rss_mb, scratch_home, show
from .urza import seed

_ROUNDS = 3
_IDLE_SECONDS = 2.0


def start(context: typer.Context, as_json: JsonOption = False) -> None:
    """Time a mesh from nothing to all SERVING, and weigh its idle processes."""
    seconds, memory = [], {}
    with scratch_home() as home:
        seed(home)
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            with Supervisor(home, without_plan(environ_of(context))) as supervisor:
                while not _all_serve(run(collect(home))):
                    time.sleep(0.01)
                seconds.append(round(time.perf_counter() - begun, 2))
                time.sleep(_IDLE_SECONDS)
                memory = {name: rss_mb(service.process.pid) for name, service in supervisor.services.items()}
    document = {"all_serving_s": sorted(seconds)[_ROUNDS // 2], "idle_rss_mb": memory, "rounds_s": seconds}
    show("start", document | {"machine": machine()}, as_json=as_json)


def _all_serve(status: dict[str, Any]) -> bool:
    return all(row["health"] == "SERVING" for row in status["services"])
