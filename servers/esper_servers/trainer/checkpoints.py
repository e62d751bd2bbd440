from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from esper_client.follower_session import FollowerSession
from esper_client.session import TrainingSession
from esper_rpc.proto.leyline.v1 import CommandType
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.ranks.following_host import FollowingSeedHost
from esper_servers.kasmina.ranks.leading_host import LeadingSeedHost
from esper_servers.tolaria.checkpoints.assembly import keep_checkpoints
from esper_servers.tolaria.checkpoints.keeper import CheckpointKeeper
from esper_servers.tolaria.checkpoints.run_checkpoints import RunCheckpoints
from esper_servers.tolaria.checkpoints.schedule import CheckpointSchedule
from esper_servers.tolaria.rollback.participants import Counters
from esper_servers.tolaria.rollback.rank_checkpoints import RankCheckpoints
from esper_servers.tolaria.rollback.ranks_participant import RanksParticipant
from esper_servers.tolaria.state.snapshot_cache import CacheConfig, SnapshotCache
from esper_servers.tolaria.state.training_state import SESSION, TrainingState

from .membership import Membership


def keep_run_checkpoints(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    session: TrainingSession,
    host: InProcessSeedHost,
    member: Membership,
    limits: LocalLimits,
) -> CheckpointKeeper | None:
    """Make checkpoints as the settings say, and where there are any, let the mesh and operators ask for a rollback."""
    config = member.checkpoint_config()
    session.checkpoints = keep_checkpoints(
        model, optimizer, session=session, host=host, config=config, rollback=member.rollback_config(),
        directory=member.checkpoint_directory(config, session.run_id),
        others=partial(others_of, host, session) if isinstance(host, LeadingSeedHost) else None,
    )  # fmt: skip
    session.close_with(partial(asyncio.to_thread, session.checkpoints.close))
    schedule = CheckpointSchedule(session.checkpoints, session, config, rollbacks_per_epoch=limits.rollbacks_per_epoch)
    if isinstance(host, LeadingSeedHost):
        host.between_steps(schedule.end_step)
        host.before_parting = session.checkpoints.settle
    else:
        session.after_step = schedule.end_step
    keeper = RunCheckpoints(session.checkpoints, session) if config.is_enabled or config.needs_directory else None
    if not config.is_enabled:
        return keeper
    host.route(CommandType.COMMAND_TYPE_ROLLBACK, lambda queued: schedule.carry_out(queued.command))
    session.features = (*session.features, "rollback")
    return keeper


def follow_checkpoints(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: FollowerSession, host: FollowingSeedHost,
    config: CacheConfig,
) -> None:  # fmt: skip
    """Have another rank make checkpoints when the first one does, and go back with it."""
    state = TrainingState(model, optimizer)
    state.register(SESSION, session)
    session.checkpoints = checkpoints = RankCheckpoints(
        state, session=session, host=host, ranks=host.ranks, cache=SnapshotCache(config),
        trained=partial(_trained, state, host, session),
    )  # fmt: skip
    host.carry_out = checkpoints.carry_out


def others_of(host: LeadingSeedHost, session: Counters, state: TrainingState) -> RanksParticipant:
    """Return what the other ranks take part in a rollback by."""
    return RanksParticipant(host, host.ranks, partial(_trained, state, host, session))


def _trained(state: TrainingState, host: LeadingSeedHost | FollowingSeedHost, session: Counters) -> Iterator[Tensor]:
    """All that must be the same on every rank."""
    yield torch.tensor([session.global_step])
    yield from state.trained_tensors()
    yield from host.trained_tensors()
