from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from esper_rpc.concurrency import ConcurrencyConfig
from esper_rpc.config import load
from esper_rpc.disk import require_writable
from esper_rpc.envelope import Keyring
from esper_rpc.logging import log_json_lines
from esper_rpc.quota import QuotaConfig
from esper_rpc.server import ServerConfig
from esper_rpc.telemetry.tracing import configure_tracing

from .console import Commands, HomeOption, environ_of, home_of, run
from .home import INSTANCE, Home

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Run one service in the foreground.")

BindOption = Annotated[str, typer.Option("--address", help="host:port to listen on; port 0 takes a free one.")]
WeatherlightOption = Annotated[
    str | None, typer.Option("--weatherlight", help="host:port of whoever renews certificates. Default: nobody does.")
]
SupervisedOption = Annotated[bool, typer.Option("--supervised", help="Drain when standard input closes.")]
InstanceOption = Annotated[str, typer.Option(help="Which identity of the role to use.")]


@app.command(epilog="Example: esper serve urza --address 127.0.0.1:7402")
def urza(
    context: typer.Context,
    address: BindOption = "127.0.0.1:0",
    instance: InstanceOption = INSTANCE,
    weatherlight: WeatherlightOption = None,
    supervised: SupervisedOption = False,
    home: HomeOption = None,
) -> None:
    """Serve the blueprint library."""
    from esper_servers.urza.server import UrzaServerConfig, serve

    log_json_lines()
    if supervised:
        _drain_with_the_supervisor()
    flush_spans = configure_tracing("urza", environ_of(context))
    place = home_of(context, home)
    config = UrzaServerConfig(
        identity_dir=place.identity_dir("urza", instance),
        state_dir=place.state_dir("urza"),
        server=_server_config(context, place, "urza", address),
        weatherlight_address=weatherlight,
    )
    run(serve(config))
    flush_spans()


@app.command(epilog="Example: esper serve tamiyo --address 127.0.0.1:7401 --urza 127.0.0.1:7402")
def tamiyo(
    context: typer.Context,
    address: BindOption = "127.0.0.1:0",
    urza: Annotated[str | None, typer.Option("--urza", help="host:port of Urza. Default: as in mesh.toml.")] = None,
    instance: InstanceOption = INSTANCE,
    weatherlight: WeatherlightOption = None,
    supervised: SupervisedOption = False,
    home: HomeOption = None,
) -> None:
    """Serve the controller that decides what a training run does next."""
    place, environ = home_of(context, home), environ_of(context)
    # Before torch is imported, which on a full disk fails with a riddle about temporary directories.
    require_writable(place.state_dir("tamiyo"))
    with _without_collector():
        from esper_rpc.pause_quota import PauseConfig
        from esper_servers.policy.prior import PriorConfig
        from esper_servers.tamiyo.blend_modes import BlendModeConfig
        from esper_servers.tamiyo.field_reports.config import ReportConfig
        from esper_servers.tamiyo.plans.plan_switch import PlanConfig
        from esper_servers.tamiyo.risk.config import RiskConfig
        from esper_servers.tamiyo.server import serve
        from esper_servers.tamiyo.server_config import TamiyoServerConfig
        from esper_servers.tamiyo.step_processes.processes import StepProcessConfig
        from esper_servers.tamiyo.turns.anticipation import AnticipationConfig
        from esper_servers.tamiyo.turns.step_queue import BatchConfig

    log_json_lines()
    if supervised:
        _drain_with_the_supervisor()
    flush_spans = configure_tracing("tamiyo", environ)
    config = TamiyoServerConfig(
        identity_dir=place.identity_dir("tamiyo", instance),
        state_dir=place.state_dir("tamiyo"),
        keyring=Keyring.find(place.identity_dir("tamiyo", instance), environ, role="tamiyo"),
        server=_server_config(context, place, "tamiyo", address),
        weatherlight_address=weatherlight,
        urza_address=place.address("urza", urza),
        risk=load(RiskConfig, "risk", path=place.settings_file, environ=environ),
        prior=load(PriorConfig, "prior", path=place.settings_file, environ=environ),
        plan=load(PlanConfig, "plan", path=place.settings_file, environ=environ),
        batch=load(BatchConfig, "batch", path=place.settings_file, environ=environ),
        anticipation=load(AnticipationConfig, "anticipation", path=place.settings_file, environ=environ),
        blending=load(BlendModeConfig, "blending", path=place.settings_file, environ=environ),
        pause=load(PauseConfig, "pause", path=place.settings_file, environ=environ),
        reports=load(ReportConfig, "reports", path=place.settings_file, environ=environ),
        step_processes=load(StepProcessConfig, "step_processes", path=place.settings_file, environ=environ),
        environ=dict(environ),
    )
    run(serve(config))
    flush_spans()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Import without looking for garbage, which takes a tenth of Tamiyo's start; hardly any of it is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _drain_with_the_supervisor() -> None:
    """Tell this process to drain when whoever started it is gone, killed or not."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def _server_config(context: typer.Context, home: Home, service: str, address: str) -> ServerConfig:
    environ = environ_of(context)
    return ServerConfig(
        address=address,
        deny_list=home.deny_list,
        audit_log=home.audit_log(service),
        quota=load(QuotaConfig, "quota", path=home.settings_file, environ=environ),
        concurrency=load(ConcurrencyConfig, "concurrency", path=home.settings_file, environ=environ),
    )
