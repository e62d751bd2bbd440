from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from esper_rpc.breaker import BreakerConfig
from esper_rpc.config import Range, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How a session asks."""

    step_budget_ms: Annotated[float, Range(2, 1000)] = 5.0
    """2 to 50 in training; more only in a benchmark."""
    breaker: BreakerConfig = field(default_factory=lambda: BreakerConfig(cool_down_seconds=0.5, successes=1))
    optimizer_family: str = ""
    world_size: int = 1

    def __post_init__(self) -> None:
        validate(self)
