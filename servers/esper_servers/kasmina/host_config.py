from __future__ import annotations

from dataclasses import dataclass, field

from esper_rpc.pause_quota import PauseConfig

from .gates.config import GateConfig
from .limits import LocalLimits
from .memory import MemoryConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedHostConfig:
    """What a seed host keeps to: [limits], [seed_gates], [pause] and [memory] of the settings."""

    limits: LocalLimits = field(default_factory=LocalLimits)
    gates: GateConfig = field(default_factory=GateConfig)
    pause: PauseConfig = field(default_factory=PauseConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
