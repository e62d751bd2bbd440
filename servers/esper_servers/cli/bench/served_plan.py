from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from esper_rpc.errors import ConfigError
from esper_servers.cli.home import Home
from esper_servers.cli.plan import build_in

PlanOption = Annotated[str, typer.Option("--plan", help="Which plan serves: compiled or eager.")]
COMPILED, EAGER = "compiled", "eager"
_VARIABLE = "ESPER_PLAN_COMPILE"


def without_plan(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which no plan is built: that would disturb what is measured."""
    return {**environ, _VARIABLE: "false"}


def with_plan(plan: str, home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Tamiyo serves this plan from its start; a compiled one is built once a user."""
    if plan == EAGER:
        return without_plan(environ)
    if plan != COMPILED:
        raise ConfigError(f"--plan is {plan!r}; choose compiled or eager.")
    directory = home.state_dir("tamiyo") / "plans"
    directory.mkdir(parents=True, mode=0o700)
    shutil.copy(build_in(_cache(environ)), directory)
    return {**environ, _VARIABLE: "true"}


def _cache(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "esper" / "plans"
