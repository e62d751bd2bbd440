from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from esper_rpc.envelope import Keyring
from esper_rpc.pause_quota import PauseConfig
from esper_rpc.server import ServerConfig
from esper_servers.policy.prior import PriorConfig

from .blend_modes import BlendModeConfig
from .field_reports.config import ReportConfig
from .field_reports.publisher import ReportPublisher
from .plans.plan_switch import PlanConfig
from .risk.config import RiskConfig
from .step_processes.processes import StepProcessConfig
from .turns.anticipation import AnticipationConfig
from .turns.step_queue import BatchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TamiyoServerConfig:
    """What the processes of Tamiyo need."""

    identity_dir: Path
    state_dir: Path
    keyring: Keyring
    server: ServerConfig = field(default_factory=ServerConfig)
    weatherlight_address: str | None = None
    """Who renews the certificate."""
    urza_address: str | None = None
    risk: RiskConfig = field(default_factory=RiskConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    anticipation: AnticipationConfig = field(default_factory=AnticipationConfig)
    blending: BlendModeConfig = field(default_factory=BlendModeConfig)
    pause: PauseConfig = field(default_factory=PauseConfig)
    reports: ReportConfig = field(default_factory=ReportConfig)
    publisher: ReportPublisher | None = None
    """Who gets field reports; without one they wait to be listed and acknowledged."""
    step_processes: StepProcessConfig = field(default_factory=StepProcessConfig)
    environ: Mapping[str, str] = field(default_factory=dict)
    """By which further step processes trace."""
