from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import typer

from esper_rpc.errors import ConfigError

from .console import Commands, HomeOption, JsonOption, home_of, print_json, run
from .home import Home

_VARIABLE = "ESPER_PLAN_COMPILE"

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The compiled form in which the policy is served.")


@app.callback()
def plan() -> None:
    """The compiled form in which the policy is served."""


@app.command(epilog="Example: esper plan build")
def build(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Build the plan now, so that Tamiyo serves it from its next start on; a minute or two of one core.

    Tamiyo builds it by itself when it is missing, and serves the eager plan meanwhile.
    """
    begun = time.perf_counter()
    package = build_in(home_of(context, home).state_dir("tamiyo") / "plans")
    document = {"package": str(package), "seconds": round(time.perf_counter() - begun, 1)}
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{package} is there after {document['seconds']} s.")


def build_in(directory: Path) -> Path:
    """Build this machine's package in a directory unless it lies there; raises ConfigError."""
    from esper_servers.policy import plan_package
    from esper_servers.tamiyo.plans.plan_switch import build_beside

    if not plan_package.has_compiler():
        raise ConfigError("A plan is compiled with a C++ compiler; install g++, or name yours in CXX.")
    package = directory / plan_package.package_name()
    if not package.exists():
        run(build_beside(package))
    return package


def with_plan(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Tamiyo serves the compiled plan from its start; it is built once a user."""
    directory = home.state_dir("tamiyo") / "plans"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copy(build_in(_cache(environ)), directory)
    return {**environ, _VARIABLE: "true"}


def without_plan(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which no plan is built: that would take a core from what is measured."""
    return {**environ, _VARIABLE: "false"}


def _cache(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "esper" / "plans"
