from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch

from esper_client.discovery import MeshAddress, find_mesh, home_directory
from esper_client.follower_session import FollowerSession
from esper_client.session import TrainingSession
from esper_rpc.errors import EsperError
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.learning_rate import LearningRateAuthority
from esper_servers.kasmina.ranks.following_host import FollowingSeedHost
from esper_servers.kasmina.ranks.leading_host import LeadingSeedHost
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.tolaria.aggregation.aggregator import GradientAggregator
from esper_servers.tolaria.checkpoints.keeper import CheckpointKeeper
from esper_servers.tolaria.checkpoints.step_end import StepEnd
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.emergency.emergencies import SWITCHED_OFF, Emergencies
from esper_servers.tolaria.emergency.escalation import called_for_by
from esper_servers.tolaria.emergency.followed_halt import FollowedHalt
from esper_servers.tolaria.emergency.shared_signal import SharedSignal, place_for
from esper_servers.tolaria.epoch_guard import EpochGuard
from esper_servers.tolaria.metrics.feed import MetricsFeed
from esper_servers.tolaria.metrics.profiling import StepProfiler
from esper_servers.tolaria.metrics.step_metrics import StepMetrics, TolariaConfig
from esper_servers.tolaria.rollback.rollback import RollbackResult
from esper_servers.tolaria.service import TolariaServicer
from esper_servers.tolaria.train_step import TrainStep
from esper_servers.tolaria.trainer import Trainer

from .detached import DetachedSession
from .growing_seeds import GrowingSeeds
from .membership import TRACES, Membership, TolariaSettings
from .quiet_trainer import QuietTrainer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tolaria:
    """What runs beside a session for its emergencies and epochs."""

    servicer: TolariaServicer
    emergencies: Emergencies
    mode: ConservativeMode
    guard: EpochGuard
    config: TolariaConfig
    checkpoints: CheckpointKeeper | None
    seeds: GrowingSeeds
    traces: Path
    learning_rates: Callable[[], Mapping[str, float]]


def orchestrate(
    session: TrainingSession | FollowerSession | DetachedSession,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str] = os.environ,
    checkpoints: CheckpointKeeper | None = None,
    train_step: TrainStep | None = None,
    aggregator: GradientAggregator | None = None,
    traces: Path | None = None,
) -> Trainer | QuietTrainer:
    """Have Tolaria end the steps and epochs of a loop with an attached session; every rank of a training calls it.

    Without a mesh, and on every rank but the first, nobody is told of them. The loop then calls `step` and `end_epoch`
    of what is returned instead of `step` and `start_epoch` of the session; or `begin_step` before backward and
    `finish_step` after the optimizer; or, with a `train_step`, only `train`. `checkpoints` is what CreateCheckpoint,
    Rollback and emergencies use instead of those of the session, `aggregator` what `backward` puts the losses of single
    seeds together with, `traces` where `profiler.request` has traces written: without it `state/trainer/traces` of the
    home, which `environ` tells where there is no mesh. Settings come from [tolaria], [emergency] and [epoch_guard].
    """
    if train_step is not None:
        _keep_scale(getattr(session, "checkpoints", None), train_step)
    if isinstance(session, (DetachedSession, FollowerSession)):
        profiler = StepProfiler(traces or home_directory(environ) / TRACES)
        return QuietTrainer(
            session, optimizer, profiler=profiler, train_step=train_step, aggregator=aggregator
        )  # fmt: skip
    parts: Tolaria = session.tolaria
    checkpoints = checkpoints or parts.checkpoints
    if checkpoints is not None:
        parts.servicer.keep(checkpoints)
    host = session.host
    trainer = Trainer(
        session=session,
        optimizer=optimizer,
        emergencies=parts.emergencies,
        mode=parts.mode,
        metrics=StepMetrics(optimizer=optimizer, config=parts.config),
        guard=parts.guard,
        checkpoints=checkpoints,
        controller=session,
        train_step=train_step,
        aggregator=aggregator,
        seeds=parts.seeds,
        profiler=StepProfiler(traces or parts.traces),
        learning_rates=parts.learning_rates,
        leads_ranks=isinstance(host, LeadingSeedHost),
    )
    if isinstance(host, LeadingSeedHost):
        host.between_steps(trainer.judge)
        # Halted here, the other ranks hear of what an operator wants.
        host.between_steps(trainer.hold)
    return trainer


def make_tolaria(
    session: TrainingSession,
    host: InProcessSeedHost,
    member: Membership,
    settings: TolariaSettings,
    keeper: CheckpointKeeper | None,
    learning_rate: LearningRateAuthority,
) -> Tolaria:
    """Let a session be halted, watched, and told of emergencies."""
    mode, feed = ConservativeMode(lambda: session.global_step), MetricsFeed()
    shared, problem = _share(session.run_id, member) if settings.emergency.share else (None, SWITCHED_OFF)
    emergencies = Emergencies(
        run_id=session.run_id,
        keyring=member.keyring,
        audience=str(member.identity.spiffe_id),
        halt=session.halt,
        mode=mode,
        config=settings.emergency,
        shared=shared,
        problem=problem,
        now_ns=host.verifier.now_ns,
        step_of=lambda: session.global_step,
    )
    emergencies.begin()
    session.listen(feed.publish)
    session.checkpoints.after_rollback = partial(_answer, emergencies)
    step_end: StepEnd = session.checkpoints.step_end
    session.halt.meanwhile(host.reach_safe_point)
    session.halt.meanwhile(partial(_reach, step_end, host))
    if isinstance(host, LeadingSeedHost):
        session.halt.meanwhile(host.stand)
    guard = EpochGuard(mode=mode, config=settings.epoch_guard)
    servicer = TolariaServicer(session, emergencies, at_safe_point=step_end.submit, mode=mode, feed=feed, guard=guard)
    if keeper is not None:
        servicer.keep(keeper)
    learning_rates = learning_rate.gauges if isinstance(learning_rate, UnifiedLRController) else dict
    return Tolaria(
        servicer, emergencies, mode, guard, settings.metrics, keeper, GrowingSeeds(host),
        member.trace_directory(session.run_id), learning_rates,
    )  # fmt: skip


def follow_halt(
    session: FollowerSession, host: FollowingSeedHost, mesh: MeshAddress | None, environ: Mapping[str, str]
) -> None:
    """Have another rank stand still at once with the first; without the mesh's files, or elsewhere, where they meet."""
    session.halt.meanwhile(host.stand)
    place = place_for(session.run_id, home=home_directory(environ))
    try:
        found = mesh or find_mesh(environ)
        if found is None or not place.exists():
            return
        shared = SharedSignal(place, run_id=session.run_id, keyring=Membership.read(found, environ).keyring)
    except (EsperError, OSError) as error:
        log.info("halt_not_followed_at_once", rank=host.ranks.rank, problem=str(error))
        return
    session.on_close = FollowedHalt(shared, session.halt, f"rank {host.ranks.rank}").close


def _keep_scale(checkpoints: Any, train_step: TrainStep) -> None:
    """Have checkpoints hold the scale of the gradients, which a run that goes back would not find again."""
    if checkpoints is not None and train_step.scaler.is_enabled():
        checkpoints.register("train_step.scaler", train_step.scaler)


def _answer(emergencies: Emergencies, result: RollbackResult) -> None:
    """Halt or hold back a run whose rollback calls for it, whoever asked for that."""
    trigger = called_for_by(result)
    if trigger is not None:
        emergencies.alarm(trigger.level, trigger.reason)


def _reach(step_end: StepEnd, host: InProcessSeedHost) -> None:
    """Do what operators left for between two steps, unless other ranks would not hear of it now."""
    if not isinstance(host, LeadingSeedHost) or host.is_heard:
        step_end.reach()


def _share(run_id: str, member: Membership) -> tuple[SharedSignal | None, str]:
    """Open the memory that processes of this run share on the host, or say why there is none."""
    try:
        place = place_for(run_id, home=home_directory(member.environ))
        return SharedSignal(place, run_id=run_id, keyring=member.keyring), ""
    except OSError as error:
        log.warning("shared_signal_unavailable", problem=str(error))
        return None, str(error)
