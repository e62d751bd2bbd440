from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from esper_rpc.errors import ConfigError
from esper_servers.cli.home import Home
from esper_servers.cli.plan import with_plan, without_plan

PlanOption = Annotated[str, typer.Option("--plan", help="Which plan serves: compiled or eager.")]
COMPILED, EAGER = "compiled", "eager"


def serving_plan(plan: str, home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Tamiyo serves this plan from its start; raises ConfigError for another word."""
    if plan not in (COMPILED, EAGER):
        raise ConfigError(f"--plan is {plan!r}; choose compiled or eager.")
    return with_plan(home, environ) if plan == COMPILED else without_plan(environ)
