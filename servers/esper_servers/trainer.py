"""The trainer side put together: what `esper_client.attach` finds."""

from __future__ import annotations

import asyncio
import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import orjson
import structlog
import torch
from opentelemetry import trace
from torch import nn

from esper_client.discovery import SETTINGS_FILE, MeshAddress, find_mesh, home_directory
from esper_client.event_loop import LoopThread
from esper_client.follower_session import FollowerSession
from esper_client.renewal import CHECK_SECONDS, CertificateRenewer
from esper_client.session import SessionConfig, TrainingSession
from esper_rpc.breaker import BreakerConfig
from esper_rpc.config import load
from esper_rpc.envelope import Keyring
from esper_rpc.errors import ConfigError
from esper_rpc.identity import Identity
from esper_rpc.logging import log_warnings_to_stderr
from esper_rpc.pause_quota import PauseConfig
from esper_rpc.proto.kasmina.v1 import kasmina_service_pb2
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType
from esper_rpc.proto.tolaria.v1 import tolaria_service_pb2
from esper_rpc.server import MeshServer, ServerConfig
from esper_rpc.telemetry.tracing import configure_tracing
from esper_servers.blueprints.catalogue import load_factories
from esper_servers.kasmina.background import BackgroundWorker
from esper_servers.kasmina.following_host import FollowingSeedHost
from esper_servers.kasmina.host import InProcessSeedHost
from esper_servers.kasmina.kernel_library import KernelConfig, KernelLibrary
from esper_servers.kasmina.kernel_source import KernelSource
from esper_servers.kasmina.leading_host import LeadingSeedHost
from esper_servers.kasmina.learning_rate import LearningRateAuthority, OptimizerAuthority
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.memory import MemoryConfig, reader_for
from esper_servers.kasmina.ranks import Ranks
from esper_servers.kasmina.service import KasminaServicer
from esper_servers.kasmina.site import Site
from esper_servers.kasmina.verdict import Verdict
from esper_servers.tolaria.assembly import keep_checkpoints
from esper_servers.tolaria.checkpoint_keeper import CheckpointKeeper
from esper_servers.tolaria.conservative_mode import ConservativeMode
from esper_servers.tolaria.emergency import SWITCHED_OFF, Emergencies
from esper_servers.tolaria.epoch_guard import EpochGuard, EpochGuardConfig
from esper_servers.tolaria.escalation import EmergencyConfig
from esper_servers.tolaria.metrics_feed import MetricsFeed
from esper_servers.tolaria.rollback import RollbackConfig
from esper_servers.tolaria.run_checkpoints import RunCheckpoints
from esper_servers.tolaria.schedule import CheckpointConfig, CheckpointSchedule
from esper_servers.tolaria.service import TolariaServicer
from esper_servers.tolaria.shared_signal import SharedSignal, place_for
from esper_servers.tolaria.step_metrics import StepMetrics, TolariaConfig
from esper_servers.tolaria.trainer import Trainer

log = structlog.get_logger(__name__)

KASMINA = kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]
TOLARIA = tolaria_service_pb2.DESCRIPTOR.services_by_name["TolariaService"]
WRAPPABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
DEFAULT_CHECKPOINTS = Path("state") / "trainer" / "checkpoints"


class DetachedSession:
    """What a loop gets when there is no mesh: the same calls, and nothing happens but what the loop asked for."""

    is_connected = False
    halted = False

    def __init__(self, model: nn.Module, learning_rate: LearningRateAuthority | None = None) -> None:
        self._model = model
        self._learning_rate = learning_rate

    def hold(self, timeout: float | None = None) -> bool:
        """Go on at once: nobody halts it."""
        return True

    def step(self, *_: Any, **__: Any) -> list[Any]:
        """Let schedules go on."""
        return self.finish_step()

    def end_epoch(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def begin_step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def finish_step(self) -> list[Any]:
        """Let schedules go on."""
        if self._learning_rate is not None:
            self._learning_rate.step()
        return []

    def start_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return where schedules are."""
        return {} if self._learning_rate is None else {"host": {"learning_rate": self._learning_rate.state_dict()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore where schedules were."""
        if self._learning_rate is not None and state:
            self._learning_rate.load_state_dict(state["host"]["learning_rate"])

    def export(self) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self._model)

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    is not given comes from [session], [breaker], [limits], [kernels], [memory] and [pause] of $ESPER_HOME/esper.toml or
    the environment. Where torch.distributed has several ranks they train one model and must all call this; with
    `distributed=False` each trains its own.
    """
    log_warnings_to_stderr()
    attach_here = partial(
        _attach, model, optimizer, environ=environ, mesh=mesh, sites=sites, run_id=run_id,
        step_budget_ms=step_budget_ms, limits=limits, learning_rate=learning_rate, kasmina_address=kasmina_address,
    )  # fmt: skip
    ranks = _find_ranks(distributed)
    if ranks is None:
        return attach_here()
    if learning_rate is not None:
        raise ConfigError("A controller of learning rates serves one rank; leave learning_rate out for several.")
    return _lead(attach_here, ranks) if ranks.is_first else _follow(model, optimizer, ranks)


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
    found = mesh or find_mesh(environ)
    if found is None:
        warnings.warn("No mesh found: training runs on without it. `esper up` starts one.", stacklevel=4)
        return DetachedSession(model, learning_rate)
    member = Membership.read(found, environ)
    config = member.session_config(step_budget_ms=step_budget_ms, optimizer_family=type(optimizer).__name__.lower())
    config = config if ranks is None else replace(config, world_size=ranks.size)
    settings = member.tolaria_settings()
    limits, thread = limits or member.limits(), LoopThread()
    authority = learning_rate or OptimizerAuthority(optimizer)
    host = _make_host(model, authority, member, sites, limits, thread, has_training_thread=True, ranks=ranks)
    session = TrainingSession(
        host=host, identity=member.identity, tamiyo_address=found.tamiyo, run_id=run_id, config=config, thread=thread
    )
    keeper = None
    if ranks is None:
        keeper = _keep_checkpoints(model, optimizer, session, host, member, limits)
    else:  # Another rank would not go back with this one.
        _keep_groups_apart(optimizer)
    session.tolaria = tolaria = _make_tolaria(session, host, member, settings, keeper)
    kasmina = thread.run(
        _serve_kasmina(host, member, kasmina_address, session.run_id, session.move, tolaria=tolaria.servicer),
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
        told = {"run_id": session.run_id, "sites": [seed.site_id for seed in session.host.describe().seeds]}
    ranks.share(orjson.dumps(told))
    return session


def _follow(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Session:
    """Attach on another rank: it opens no connection, and serves nothing."""
    told = orjson.loads(ranks.share())
    if "error" in told:
        raise ConfigError(f"The first rank could not attach: {told['error']}")
    if not told["run_id"]:
        return DetachedSession(model)
    sites = wrap_sites(model, told["sites"])
    for site in sites.values():
        site.keeps_graph = True
    _keep_groups_apart(optimizer)
    host = FollowingSeedHost(
        model=model, sites=sites, factories=load_factories(), learning_rate=OptimizerAuthority(optimizer), ranks=ranks
    )
    return FollowerSession(host, told["run_id"])


def _keep_groups_apart(optimizer: torch.optim.Optimizer) -> None:
    # Marked as scheduled it gets no group of a kept seed: it steps before the gradients of that are averaged.
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])


def serve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    environ: Mapping[str, str] = os.environ,
    mesh: MeshAddress | None = None,
    sites: Sequence[str] | None = None,
    run_id: str = "",
    limits: LocalLimits | None = None,
    address: str = "127.0.0.1:0",
) -> ServedModel:
    """Wrap sites of a model that a loop in another process drives, and serve Kasmina for its RemoteSeedHost.

    Between its own calls that loop ends a step here by RPC: nothing else may run the model meanwhile.

    Raises:
        ConfigError: When there is no mesh, or the model cannot be wrapped.
    """
    found = mesh or find_mesh(environ)
    if found is None:
        raise ConfigError("No mesh found: `esper up` starts one.")
    member = Membership.read(found, environ)
    limits, thread = limits or member.limits(), LoopThread("esper-kasmina")
    authority = OptimizerAuthority(optimizer)
    host = _make_host(model, authority, member, sites, limits, thread, has_training_thread=False)
    server = thread.run(_serve_kasmina(host, member, address, run_id, lambda: None), timeout=10)
    return ServedModel(host, server, thread)


class ServedModel:
    """A model that another process trains, while its KasminaService runs."""

    def __init__(self, host: InProcessSeedHost, server: MeshServer, thread: LoopThread) -> None:
        self.host = host
        self.address = server.address
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stop serving. The model stays as it is."""
        self.host.close()
        self._thread.run(self._server.drain(), timeout=self._server.config.drain_seconds + 5)
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Membership:
    """What a process needs to take part: where the mesh is, who it is, its keys, and its settings."""

    mesh: MeshAddress
    identity: Identity
    keyring: Keyring
    environ: Mapping[str, str]

    @classmethod
    def read(cls, mesh: MeshAddress, environ: Mapping[str, str]) -> Membership:
        """Read the files; raises ConfigError."""
        identity = Identity.load(mesh.identity_dir)
        keyring = Keyring.find(mesh.identity_dir, environ, role=identity.spiffe_id.role)
        return cls(mesh, identity, keyring, environ)

    def limits(self) -> LocalLimits:
        """Read [limits]."""
        return load(LocalLimits, "limits", path=self._settings, environ=self.environ)

    def kernels(self) -> KernelConfig:
        """Read [kernels]."""
        return load(KernelConfig, "kernels", path=self._settings, environ=self.environ)

    def memory(self) -> MemoryConfig:
        """Read [memory]."""
        return load(MemoryConfig, "memory", path=self._settings, environ=self.environ)

    def pause(self) -> PauseConfig:
        """Read [pause]."""
        return load(PauseConfig, "pause", path=self._settings, environ=self.environ)

    def tolaria_settings(self) -> TolariaSettings:
        """Read [emergency], [epoch_guard] and [tolaria]."""
        return TolariaSettings(
            load(EmergencyConfig, "emergency", path=self._settings, environ=self.environ),
            load(EpochGuardConfig, "epoch_guard", path=self._settings, environ=self.environ),
            load(TolariaConfig, "tolaria", path=self._settings, environ=self.environ),
        )

    def session_config(self, *, step_budget_ms: float | None, optimizer_family: str) -> SessionConfig:
        """Read [session] and [breaker]; a budget that is given wins."""
        config = load(SessionConfig, "session", path=self._settings, environ=self.environ)
        breaker = load(BreakerConfig, "breaker", path=self._settings, environ=self.environ, base=config.breaker)
        budget = config.step_budget_ms if step_budget_ms is None else step_budget_ms
        return replace(config, breaker=breaker, step_budget_ms=budget, optimizer_family=optimizer_family)

    def checkpoint_config(self) -> CheckpointConfig:
        """Read [checkpoints]."""
        return load(CheckpointConfig, "checkpoints", path=self._settings, environ=self.environ)

    def rollback_config(self) -> RollbackConfig:
        """Read [rollback]."""
        return load(RollbackConfig, "rollback", path=self._settings, environ=self.environ)

    def checkpoint_directory(self, config: CheckpointConfig, run_id: str) -> Path:
        """Where the checkpoints of a run are; its name may hold anything."""
        parent = Path(config.directory) if config.directory else home_directory(self.environ) / DEFAULT_CHECKPOINTS
        return parent / quote(run_id, safe="").replace(".", "%2E")

    def trace(self) -> Callable[[], object]:
        """Trace if the environment asks for it; a program that set up OpenTelemetry itself keeps its own provider."""
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return configure_tracing("trainer", self.environ)
        return lambda: None

    @property
    def _settings(self) -> Path:
        return home_directory(self.environ) / SETTINGS_FILE


def _make_host(
    model: nn.Module,
    learning_rate: LearningRateAuthority,
    member: Membership,
    site_names: Sequence[str] | None,
    limits: LocalLimits,
    thread: LoopThread,
    *,
    has_training_thread: bool,
    ranks: Ranks | None = None,
) -> InProcessSeedHost:
    source = KernelSource(member.mesh.urza, member.identity)
    library = KernelLibrary(source.fetch, thread.spawn, config=member.kernels())
    sites = wrap_sites(model, site_names if site_names is not None else choose_sites(model))
    for site in sites.values():
        site.keeps_graph = ranks is not None
    kind = InProcessSeedHost if ranks is None else partial(LeadingSeedHost, ranks=ranks)
    host = kind(
        model=model,
        sites=sites,
        keyring=member.keyring,
        audience=str(member.identity.spiffe_id),
        library=library,
        factories=load_factories(),
        learning_rate=learning_rate,
        limits=limits,
        pause=member.pause(),
        memory=member.memory(),
        read_memory=reader_for(next((p.device for p in model.parameters()), torch.device("cpu"))),
        background=BackgroundWorker("esper-prewarm"),
        has_training_thread=has_training_thread,
    )
    thread.spawn(source.keep_catalogue(library))
    return host


def _keep_checkpoints(
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

    def carry_out(command: AdaptationCommand) -> Verdict | None:
        answer = schedule.carry_out(command)
        return None if answer is None else Verdict(*answer)

    host.route(CommandType.COMMAND_TYPE_ROLLBACK, carry_out)
    session.features = (*session.features, "rollback")
    return keeper


def choose_sites(model: nn.Module) -> list[str]:
    """Name every layer that can be a site, except the last one."""
    return _layers(model)[:-1]


def _layers(model: nn.Module) -> list[str]:
    # These read the weights of their children past any forward, so that a site inside would do nothing.
    opaque = [name for name, module in model.named_modules() if isinstance(module, OPAQUE)]
    names = [name for name, module in model.named_modules() if name and isinstance(module, WRAPPABLE)]
    return [name for name in names if not name.startswith(tuple(f"{each}." for each in opaque))]


def wrap_sites(model: nn.Module, names: Sequence[str]) -> dict[str, Site]:
    """Replace submodules by sites; raises ConfigError when the model is wrapped already or a name is unknown."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)
    is_compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if is_compiled or isinstance(model, wrappers):
        raise ConfigError("Attach before torch.compile and before DistributedDataParallel: sites go inside.")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"The model has no submodule {unknown[0]!r}.")
    if any(isinstance(module, Site) for module in known.values()):
        raise ConfigError("This model has been attached already.")
    sites, head = {}, _layers(model)[-1:]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        sites[name] = Site(known[name], is_head=name in head)
        setattr(known[parent], leaf, sites[name])
    return sites


@dataclass(frozen=True, slots=True)
class TolariaSettings:
    """What a trainer reads for its emergencies, epochs and metrics."""

    emergency: EmergencyConfig
    epoch_guard: EpochGuardConfig
    metrics: TolariaConfig


@dataclass(frozen=True, slots=True)
class Tolaria:
    """What runs beside a session for its emergencies and epochs."""

    servicer: TolariaServicer
    emergencies: Emergencies
    mode: ConservativeMode
    guard: EpochGuard
    config: TolariaConfig
    checkpoints: CheckpointKeeper | None


def orchestrate(
    session: TrainingSession | DetachedSession,
    optimizer: torch.optim.Optimizer,
    *,
    checkpoints: CheckpointKeeper | None = None,
) -> Trainer | DetachedSession:
    """Have Tolaria end the steps and epochs of a loop with an attached session; without a mesh the session itself.

    The loop then calls `step` and `end_epoch` of what is returned instead of `step` and `start_epoch` of the session.
    `checkpoints` is what CreateCheckpoint, Rollback and emergencies use instead of those of the session. Settings come
    from [tolaria], [emergency] and [epoch_guard].
    """
    if isinstance(session, DetachedSession):
        return session
    parts: Tolaria = session.tolaria
    checkpoints = checkpoints or parts.checkpoints
    if checkpoints is not None:
        parts.servicer.keep(checkpoints)
    return Trainer(
        session=session,
        optimizer=optimizer,
        emergencies=parts.emergencies,
        mode=parts.mode,
        metrics=StepMetrics(optimizer=optimizer, config=parts.config),
        guard=parts.guard,
        checkpoints=checkpoints,
        controller=session,
    )


def _make_tolaria(
    session: TrainingSession,
    host: InProcessSeedHost,
    member: Membership,
    settings: TolariaSettings,
    keeper: CheckpointKeeper | None,
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
    session.halt.meanwhile(host.reach_safe_point)
    guard = EpochGuard(mode=mode, config=settings.epoch_guard)
    servicer = TolariaServicer(
        session, emergencies, at_safe_point=host.at_safe_point, mode=mode, feed=feed, guard=guard
    )
    if keeper is not None:
        servicer.keep(keeper)
    return Tolaria(servicer, emergencies, mode, guard, settings.metrics, keeper)


def _share(run_id: str, member: Membership) -> tuple[SharedSignal | None, str]:
    """Open the memory that processes of this run share on the host, or say why there is none."""
    try:
        place = place_for(run_id, home=home_directory(member.environ))
        return SharedSignal(place, run_id=run_id, keyring=member.keyring), ""
    except OSError as error:
        log.warning("shared_signal_unavailable", problem=str(error))
        return None, str(error)


async def _serve_kasmina(
    host: InProcessSeedHost,
    member: Membership,
    address: str,
    run_id: str,
    on_renewed: Callable[[], object],
    *,
    tolaria: TolariaServicer | None = None,
) -> MeshServer:
    config = ServerConfig(address=address, drain_seconds=0.5, deny_list=member.mesh.deny_list)
    server = MeshServer(config=config, identity=member.identity)
    server.add_service(KASMINA, KasminaServicer(host, run_id))
    if tolaria is not None:
        server.add_service(TOLARIA, tolaria)
    await server.start()
    renewer = CertificateRenewer(
        member.identity, address=member.mesh.weatherlight, on_renewed=lambda _identity: on_renewed()
    )
    server.every(CHECK_SECONDS, renewer.check)
    server.every(CHECK_SECONDS, member.keyring.refresh)
    return server
