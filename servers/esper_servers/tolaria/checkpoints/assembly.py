from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from esper_servers.tolaria.rollback import participants
from esper_servers.tolaria.rollback.participants import SeedHostParticipant, TamiyoParticipant, TrainingParticipant
from esper_servers.tolaria.rollback.ranks_participant import RanksParticipant
from esper_servers.tolaria.rollback.rollback import Participant, Rollback, RollbackConfig
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore
from esper_servers.tolaria.state.snapshot_cache import SnapshotCache
from esper_servers.tolaria.state.training_state import SESSION, TrainingState

from .checkpoints import Checkpoints
from .schedule import CheckpointConfig


class Session(participants.Session, Protocol):
    """The session of a run, as a part of its checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the seeds."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


def keep_checkpoints(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    session: Session,
    host: participants.SeedHost,
    directory: Path,
    config: CheckpointConfig,
    rollback: RollbackConfig,
    others: Callable[[TrainingState], RanksParticipant] | None = None,
) -> Checkpoints:
    """Put together what keeps the checkpoints of a run; raises ConfigError when the directory cannot be written.

    `others` makes what the other ranks of the training take part by.
    """
    state = TrainingState(model, optimizer)
    state.register(SESSION, session)
    cache = SnapshotCache(config.cache)
    store = CheckpointStore(directory, config.store) if config.needs_directory else None
    ranks = None if others is None else others(state)
    members: list[Participant] = [SeedHostParticipant(session, host), TrainingParticipant(state)]
    if ranks is not None:
        # First, so that they go back while this rank does.
        members.insert(0, ranks)
    rolling = Rollback([TamiyoParticipant(session), *members], cache=cache, store=store, config=rollback)
    return Checkpoints(state, cache=cache, store=store, rollback=rolling, ranks=ranks)
