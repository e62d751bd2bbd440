from __future__ import annotations

import subprocess
import time

import typer

from esper_client import UrzaClient
from esper_rpc.proto.urza.v1 import GetExtrasRequest, ListBlueprintsRequest
from esper_servers.cli.console import JsonOption, environ_of, run
from esper_servers.cli.home import Home
from esper_servers.cli.processes import ServicePlan, Supervisor, cli_command

from .measure import WARM_UP, CountOption, machine, percentiles, scratch_home, show


def urza(context: typer.Context, steps: CountOption = 1000, as_json: JsonOption = False) -> None:
    """Measure GetExtras of a blueprint that Urza holds in memory."""
    with scratch_home() as home:
        seed(home)
        with Supervisor(home, environ_of(context), (ServicePlan(name="urza"),)) as supervisor:
            times = run(_measure(home, supervisor.addresses["urza"], steps))
    show("urza", {"get_extras": percentiles(times), "machine": machine()}, as_json=as_json)


def seed(home: Home) -> None:
    """Install the library in a process of its own, so that torch stays out of this one."""
    command = [*cli_command(), "urza", "seed", "--home", str(home.directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def _measure(home: Home, address: str, count: int) -> list[float]:
    times = []
    async with UrzaClient(address, identity=home.identity("trainer")) as client:
        names = [b.descriptor.blueprint_id for b in (await client.list_blueprints(ListBlueprintsRequest())).blueprints]
        for turn in range(count + WARM_UP):
            request = GetExtrasRequest(blueprint_id=names[turn % len(names)])
            begun = time.perf_counter()
            await client.get_extras(request)
            times.append((time.perf_counter() - begun) * 1e3)
    return times[WARM_UP:]
