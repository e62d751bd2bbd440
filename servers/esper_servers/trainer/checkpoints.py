from __future__ import annotations

import asyncio
from functools import partial

import torch
from torch import nn

from esper_client.session import TrainingSession
from esper_rpc.proto.leyline.v1 import CommandType
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.inbox import Queued
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.verdict import Verdict
from esper_servers.tolaria.assembly import keep_checkpoints
from esper_servers.tolaria.checkpoint_keeper import CheckpointKeeper
from esper_servers.tolaria.run_checkpoints import RunCheckpoints
from esper_servers.tolaria.schedule import CheckpointSchedule

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
    )  # fmt: skip
    session.close_with(partial(asyncio.to_thread, session.checkpoints.close))
    schedule = CheckpointSchedule(session.checkpoints, session, config, rollbacks_per_epoch=limits.rollbacks_per_epoch)
    session.after_step = schedule.end_step
    keeper = RunCheckpoints(session.checkpoints, session) if config.is_enabled or config.needs_directory else None
    if not config.is_enabled:
        return keeper

    def carry_out(queued: Queued) -> Verdict | None:
        answer = schedule.carry_out(queued.command)
        return None if answer is None else Verdict(*answer)

    host.route(CommandType.COMMAND_TYPE_ROLLBACK, carry_out)
    session.features = (*session.features, "rollback")
    return keeper
