from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError

Share = Annotated[float, Range(0, 1)]
Percent = Annotated[float, Range(0, 100)]
Milliseconds = Annotated[float, Range(1, 60_000)]
Norm = Annotated[float, Range(0, 1_000_000)]
Steps = Annotated[int, Range(1, 1_000_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskConfig:
    """Thresholds and weights."""

    loss_spike: Annotated[float, Range(0, 1000)] = 0.15
    """Rise of the loss within one step, beyond its usual spread."""
    spread: Annotated[float, Range(0, 100)] = 4.0
    """A rise counts only beyond this many standard deviations: small batches are noisy."""
    loss_volatility: Norm = 0.5
    loss_variance_base: Norm = 0.1
    loss_variance_warning: Norm = 0.3
    loss_variance_emergency: Norm = 0.5
    loss_variance_weight: Share = 0.2

    gradient_base: Norm = 5.0
    gradient_warning: Norm = 10.0
    gradient_emergency: Norm = 20.0
    gradient_weight: Share = 0.3
    gradient_volatility: Norm = 1.0
    gradient_variance: Norm = 1.0
    gradient_conflict_rate: Share = 0.5

    stability: Share = 0.6

    hook_latency_ms: Milliseconds = 50.0
    slow_hooks: Steps = 3
    step_latency_ms: Milliseconds = 120.0
    apply_ms: Milliseconds = 30.0
    finalize_ms: Milliseconds = 30.0
    latency_base_ms: Milliseconds = 100.0
    latency_emergency_ms: Milliseconds = 500.0
    latency_weight: Share = 0.25

    memory_base: Share = 0.8
    memory_blocking: Share = 0.85
    memory_emergency: Share = 0.95
    memory_weight: Share = 0.25
    gpu_percent: Percent = 95.0
    gpu_free_gb: Norm = 0.5
    cpu_percent: Percent = 95.0

    learning_rate: Share = 1e-6
    seed_risk: Share = 0.8
    unsettled_seeds: Share = 0.5
    coverage: Share = 0.25

    emergency_score: Share = 0.8
    emergency_dimensions: Annotated[int, Range(1, 4)] = 3
    repeats: Steps = 3
    """High risk so many steps in a row puts the run into conservative mode."""
    cool_down_steps: Steps = 50

    def __post_init__(self) -> None:
        validate(self)
        for name in ("loss_variance", "gradient", "memory"):
            self._check_order(f"{name}_base", f"{name}_emergency")
        self._check_order("latency_base_ms", "latency_emergency_ms")

    def _check_order(self, base: str, emergency: str) -> None:
        if getattr(self, base) >= getattr(self, emergency):
            raise ConfigError(f"{base} = {getattr(self, base):g} must be below {emergency}.")
