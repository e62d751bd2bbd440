from __future__ import annotations

import contextlib
import signal
import threading
from typing import Annotated

import typer
from rich.console import Console

from esper_rpc.errors import EsperError

from .console import HomeOption, environ_of, home_of
from .processes import ServicePlan, Supervisor

_WATCH_SECONDS = 0.5
_BACKOFF_SECONDS = 2.0
_STEADY_SECONDS = 60.0
"""A service that ran for so long is started again at once."""


def up(
    context: typer.Context,
    tamiyo_address: Annotated[str, typer.Option(help="Where Tamiyo listens.")] = "127.0.0.1:0",
    urza_address: Annotated[str, typer.Option(help="Where Urza listens.")] = "127.0.0.1:0",
    enrolment_address: Annotated[str, typer.Option(help="Where new machines redeem tokens.")] = "127.0.0.1:0",
    weatherlight_address: Annotated[str, typer.Option(help="Where members renew their certificates.")] = "127.0.0.1:0",
    metrics_port: Annotated[int, typer.Option(help="Where /metrics is served on loopback; 0 takes a free port.")] = 0,
    home: HomeOption = None,
) -> None:
    """Start the mesh on this machine, watch it, and drain it on Ctrl-C."""
    place = home_of(context, home)
    place.prepare()
    plans = (
        ServicePlan(name="urza", address=urza_address),
        ServicePlan(name="tamiyo", address=tamiyo_address, needs=("urza",)),
    )
    stop = _stop_on_signals()
    console = Console(stderr=True)
    with Supervisor(
        place,
        environ_of(context),
        plans,
        enrolment_address=enrolment_address,
        weatherlight_address=weatherlight_address,
        metrics_port=metrics_port,
    ) as supervisor:
        for name, address in supervisor.addresses.items():
            console.print(f"[green]serving[/] {name} at {address}")
        console.print(f"wrote {place.mesh_file}; training finds it with ESPER_HOME={place.directory}. Ctrl-C drains.")
        _watch(supervisor, stop, console)


def _watch(supervisor: Supervisor, stop: threading.Event, console: Console) -> None:
    while not stop.wait(_WATCH_SECONDS):
        for role in supervisor.home.renew_leaves():
            console.print(f"issued the certificate of {role} again")
        with contextlib.suppress(OSError):  # Without room for a copy the log grows on; doctor warns of the disk.
            supervisor.rotate_logs()
        for name in supervisor.ended():
            console.print(
                f"[red]{name} ended[/] with {supervisor.services[name].process.returncode}; starting it again"
            )
            if not stop.wait(_rest(supervisor, name)):
                _restart(supervisor, name, console)


def _rest(supervisor: Supervisor, name: str) -> float:
    return 0.0 if supervisor.seconds_since_start(name) >= _STEADY_SECONDS else _BACKOFF_SECONDS


def _restart(supervisor: Supervisor, name: str, console: Console) -> None:
    """Start a service again; when it cannot start, the others go on and the next round tries again."""
    try:
        supervisor.restart(name)
    except EsperError as error:
        console.print(f"[red]{name} does not start[/]: {error.message}", soft_wrap=True)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
