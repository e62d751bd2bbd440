from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from esper_rpc.errors import ConfigError
from esper_servers.cli.home import Home
from esper_servers.cli.plan import with_plan, without_plan

PlanOption = Annotated[str, typer.Option("--plan", help="Which plan serves: compiled, eager or cuda.")]
COMPILED, EAGER, CUDA = "compiled", "eager", "cuda"
_DEVICE = "ESPER_PLAN_DEVICE"


def serving_plan(plan: str, home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Tamiyo serves this plan from its start; raises ConfigError for another word.

    A CUDA device has to be there: what falls back to the CPU is not what was to be measured.
    """
    if plan == CUDA:
        _require_device()
        return {**without_plan(environ), _DEVICE: CUDA}
    if plan not in (COMPILED, EAGER):
        raise ConfigError(f"--plan is {plan!r}; choose compiled, eager or cuda.")
    served = with_plan(home, environ) if plan == COMPILED else without_plan(environ)
    return {**served, _DEVICE: "cpu"}


def _require_device() -> None:
    """Raise ConfigError without a CUDA device."""
    from esper_servers.policy import cuda_device

    try:
        cuda_device.find_device(cuda_device.CUDA)
    except ConfigError as error:
        raise ConfigError(f"--plan cuda is measured on a machine that has one. {error.message}") from error
