from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from esper_client.discovery import MeshAddress
from esper_rpc.errors import ConfigError
from esper_servers.kasmina.limits import LocalLimits

LONGEST_RUN_ID = 128
"""In characters, as OpenRun takes it."""


def check_arguments(
    model: Any,
    optimizer: Any,
    *,
    mesh: Any = None,
    sites: Sequence[str] | None = None,
    run_id: Any = "",
    step_budget_ms: Any = None,
    limits: Any = None,
    learning_rate: Any = None,
) -> None:
    """Raise ConfigError for what is of the wrong kind, before anything is touched."""
    _check(isinstance(model, nn.Module), "model", model, "a torch.nn.Module")
    _check(hasattr(optimizer, "param_groups"), "optimizer", optimizer, "a torch.optim.Optimizer")
    _check(mesh is None or isinstance(mesh, MeshAddress), "mesh", mesh, "an esper_client.MeshAddress")
    _check(not isinstance(sites, str), "sites", sites, "a list of the names of submodules")
    _check(isinstance(run_id, str) and len(run_id) <= LONGEST_RUN_ID, "run_id", run_id, "at most 128 characters")
    _check(
        step_budget_ms is None or isinstance(step_budget_ms, int | float), "step_budget_ms", step_budget_ms, "a number"
    )
    _check(limits is None or isinstance(limits, LocalLimits), "limits", limits, "LocalLimits of esper_servers.kasmina")
    is_authority = learning_rate is None or hasattr(learning_rate, "adopt")
    _check(is_authority, "learning_rate", learning_rate, "a UnifiedLRController of esper_servers.optim")


def _check(is_right: bool, name: str, value: Any, kind: str) -> None:
    if not is_right:
        shown = repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        raise ConfigError(f"{name} must be {kind}, not {shown}.")
