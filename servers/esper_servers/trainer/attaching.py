from __future__ import annotations

import asyncio
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import orjson
import torch
from torch import nn

from esper_client.discovery import MeshAddress, find_mesh
from esper_client.event_loop import LoopThread
from esper_client.follower_session import FollowerSession
from esper_client.session import SessionConfig, TrainingSession
from esper_rpc.errors import ConfigError
from esper_rpc.logging import log_warnings_to_stderr
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.learning_rate import LearningRateAuthority, OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.ranks.following_host import FollowingSeedHost
from esper_servers.kasmina.ranks.ranks import Ranks
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.tolaria.state.snapshot_cache import CacheConfig

from .arguments import check_arguments
from .checkpoints import follow_checkpoints, keep_run_checkpoints
from .detached import DetachedSession
from .membership import Membership, TolariaSettings
from .orchestration import follow_halt, make_tolaria
from .routing import breakers_of, route_commands
from .seed_host import make_seed_host
from .serving import serve_host
from .sites import undone_if_it_fails, wrap_sites

Session = TrainingSession | FollowerSession | DetachedSession


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str] = os.environ,
    mesh: MeshAddress | None = None,
    sites: Sequence[str] | None = None,
    run_id: str = "",
    step_budget_ms: float | None = None,
    limits: LocalLimits | None = None,
    learning_rate: LearningRateAuthority | None = None,
    kasmina_address: str = "127.0.0.1:0",
    distributed: bool | None = None,
) -> Session:
    """Wrap sites of the model, open the run and serve Kasmina. See esper_client.attach.

    Without `sites` every hidden Linear or convolution becomes one; the last layer does not. Without `learning_rate`
    rates stay the user's, or those of the user's scheduler; a UnifiedLRController is the only one who sets them. What
    is not given comes from [session], [breaker], [limits], [seed_gates], [kernels], [memory] and [pause] of
    $ESPER_HOME/esper.toml or the environment. Where torch.distributed has several ranks they train one model and must
    all call this; with `distributed=False` each trains its own.
    """
    log_warnings_to_stderr()
    attach_here = partial(
        _attach, model, optimizer, environ=environ, mesh=mesh, sites=sites, run_id=run_id,
        step_budget_ms=step_budget_ms, limits=limits, learning_rate=learning_rate, kasmina_address=kasmina_address,
    )  # fmt: skip
    ranks = _find_ranks(distributed)
    if ranks is None:
        return attach_here()
    if not isinstance(learning_rate, UnifiedLRController | None):
        raise ConfigError("Only a UnifiedLRController can set the learning rates of several ranks.")
    if ranks.is_first:
        return _lead(attach_here, ranks)
    return _follow(model, optimizer, learning_rate, ranks, mesh=mesh, environ=environ)


def _attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str],
    mesh: MeshAddress | None,
    sites: Sequence[str] | None,
    run_id: str,
    step_budget_ms: float | None,
    limits: LocalLimits | None,
    learning_rate: LearningRateAuthority | None,
    kasmina_address: str,
    ranks: Ranks | None = None,
) -> TrainingSession | DetachedSession:
    check_arguments(
        model, optimizer, mesh=mesh, sites=sites, run_id=run_id, step_budget_ms=step_budget_ms, limits=limits,
        learning_rate=learning_rate,
    )  # fmt: skip
    found = mesh or find_mesh(environ)
    if found is None:
        warnings.warn("No mesh found: training runs on without it. `esper up` starts one.", stacklevel=4)
        return DetachedSession(model, learning_rate, run_id)
    member = Membership.read(found, environ)
    config = member.session_config(step_budget_ms=step_budget_ms, optimizer_family=type(optimizer).__name__.lower())
    config = config if ranks is None else dataclasses.replace(config, world_size=ranks.size)
    settings = member.tolaria_settings()
    limits, thread = limits or member.limits(), LoopThread()
    with undone_if_it_fails(model, thread):
        return _join(
            model, optimizer, member, settings, limits, thread, learning_rate or OptimizerAuthority(optimizer),
            sites=sites, run_id=run_id, config=config, kasmina_address=kasmina_address, ranks=ranks,
        )  # fmt: skip


def _join(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    member: Membership,
    settings: TolariaSettings,
    limits: LocalLimits,
    thread: LoopThread,
    authority: LearningRateAuthority,
    *,
    sites: Sequence[str] | None,
    run_id: str,
    config: SessionConfig,
    kasmina_address: str,
    ranks: Ranks | None,
) -> TrainingSession:
    host = make_seed_host(model, authority, member, sites, limits, thread, has_training_thread=True, ranks=ranks)
    session = TrainingSession(
        host=host,
        identity=member.identity,
        tamiyo_address=member.mesh.tamiyo,
        run_id=run_id,
        config=config,
        thread=thread,
    )
    if ranks is not None:
        _keep_apart(optimizer, authority)
    keeper = keep_run_checkpoints(model, optimizer, session, host, member, limits)
    session.tolaria = tolaria = make_tolaria(session, host, member, settings, keeper, authority)
    breakers = breakers_of(host, tolaria.guard, authority)
    session.features = (*session.features, *route_commands(host, tolaria.emergencies, breakers))
    kasmina = thread.run(
        serve_host(host, member, kasmina_address, session.run_id, session.move, tolaria=tolaria.servicer),
        timeout=10,
    )
    session.kasmina_address = kasmina.address
    session.close_with(tolaria.servicer.close)
    session.close_with(kasmina.drain)
    session.close_with(partial(asyncio.to_thread, member.trace()))
    return session


def _find_ranks(distributed: bool | None) -> Ranks | None:
    is_ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and not is_ready:
        raise ConfigError("Call torch.distributed.init_process_group before attaching with distributed=True.")
    if distributed is False or not is_ready or torch.distributed.get_world_size() == 1:
        return None
    return Ranks()


def _lead(attach_here: Callable[..., TrainingSession | DetachedSession], ranks: Ranks) -> Session:
    """Attach on the first rank, and tell the others what came of it."""
    try:
        session = attach_here(ranks=ranks)
    except Exception as error:
        ranks.share(orjson.dumps({"error": str(error)}))
        raise
    told: dict[str, Any] = {"run_id": ""}
    if isinstance(session, TrainingSession):
        told = {
            "run_id": session.run_id, "sites": [seed.site_id for seed in session.host.describe().seeds],
            "snapshots": dataclasses.asdict(session.checkpoints.cache_config),
        }  # fmt: skip
    ranks.share(orjson.dumps(told))
    return session


def _follow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: UnifiedLRController | None,
    ranks: Ranks,
    *,
    mesh: MeshAddress | None,
    environ: Mapping[str, str],
) -> Session:
    """Attach on another rank: it opens no connection, and serves nothing."""
    told = orjson.loads(ranks.share())
    if "error" in told:
        raise ConfigError(f"The first rank could not attach: {told['error']}")
    if not told["run_id"]:
        return DetachedSession(model, learning_rate)
    sites = wrap_sites(model, told["sites"])
    for site in sites.values():
        site.keeps_graph = True
    _keep_apart(optimizer, learning_rate)
    authority = learning_rate or OptimizerAuthority(optimizer)
    host = FollowingSeedHost(
        model=model, sites=sites, factories=load_factories(), learning_rate=authority, ranks=ranks
    )  # fmt: skip
    session = FollowerSession(host, told["run_id"])
    follow_checkpoints(model, optimizer, session, host, CacheConfig(**told["snapshots"]))
    follow_halt(session, host, mesh, environ)
    return session


def _keep_apart(optimizer: torch.optim.Optimizer, learning_rate: LearningRateAuthority | None) -> None:
    """Have kept seeds join no group of the user's optimizer, which steps before their gradients are averaged."""
    if isinstance(learning_rate, UnifiedLRController):
        learning_rate.serve_ranks()
        return
    # Marked as scheduled it gets none.
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
