from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from esper_rpc.errors import ConfigError

GROUP = "esper.trainer"


def attach(model: Any, optimizer: Any, **options: Any) -> Any:
    """Wrap a PyTorch model for the mesh and return its TrainingSession.

    The mesh is found in `mesh=`, then in the environment, then in $ESPER_HOME/mesh.toml. Without one there is a single
    warning and the session does nothing. Options: run_id, sites, step_budget_ms, limits,
    learning_rate (see esper_servers.trainer).

    Raises:
        ConfigError: When the trainer runtime is not installed, or the model cannot be wrapped.
    """
    for entry in entry_points(group=GROUP):
        try:
            runtime = entry.load()
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is missing; install it with: pip install 'esper-rpc[trainer]'") from error
        return runtime(model, optimizer, environ=os.environ, **options)
    raise ConfigError("No trainer runtime is installed; install it with: pip install 'esper-rpc[trainer]'")
