from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from opentelemetry import trace

from esper_client.discovery import SETTINGS_FILE, MeshAddress, home_directory
from esper_client.session import SessionConfig
from esper_rpc.breaker import BreakerConfig
from esper_rpc.config import load
from esper_rpc.envelope import Keyring
from esper_rpc.identity import Identity
from esper_rpc.pause_quota import PauseConfig
from esper_rpc.telemetry.tracing import configure_tracing
from esper_servers.kasmina.gates.config import GateConfig
from esper_servers.kasmina.host_config import SeedHostConfig
from esper_servers.kasmina.kernels.library import KernelConfig
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.memory import MemoryConfig
from esper_servers.tolaria.checkpoints.schedule import CheckpointConfig
from esper_servers.tolaria.emergency.escalation import EmergencyConfig
from esper_servers.tolaria.epoch_guard import EpochGuardConfig
from esper_servers.tolaria.metrics.step_metrics import TolariaConfig
from esper_servers.tolaria.rollback.rollback import RollbackConfig

DEFAULT_CHECKPOINTS = Path("state") / "trainer" / "checkpoints"
TRACES = Path("state") / "trainer" / "traces"


@dataclass(frozen=True, slots=True)
class TolariaSettings:
    """What a trainer reads for its emergencies, epochs and metrics."""

    emergency: EmergencyConfig
    epoch_guard: EpochGuardConfig
    metrics: TolariaConfig


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

    def seed_host_config(self, limits: LocalLimits) -> SeedHostConfig:
        """Read [seed_gates], [pause] and [memory], beside limits that were read or given."""
        return SeedHostConfig(
            limits=limits,
            gates=load(GateConfig, "seed_gates", path=self._settings, environ=self.environ),
            pause=load(PauseConfig, "pause", path=self._settings, environ=self.environ),
            memory=load(MemoryConfig, "memory", path=self._settings, environ=self.environ),
        )

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
        """Where the checkpoints of a run are."""
        parent = Path(config.directory) if config.directory else home_directory(self.environ) / DEFAULT_CHECKPOINTS
        return parent / name_of(run_id)

    def trace_directory(self, run_id: str) -> Path:
        """Where the traces of a run are."""
        return home_directory(self.environ) / TRACES / name_of(run_id)

    def trace(self) -> Callable[[], object]:
        """Trace if the environment asks for it; a program that set up OpenTelemetry itself keeps its own provider."""
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return configure_tracing("trainer", self.environ)
        return lambda: None

    @property
    def _settings(self) -> Path:
        return home_directory(self.environ) / SETTINGS_FILE


def name_of(run_id: str) -> str:
    """Name a directory for a run, whose own name may hold anything."""
    return quote(run_id, safe="").replace(".", "%2E")
