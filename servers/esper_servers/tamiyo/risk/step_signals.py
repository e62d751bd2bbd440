from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from esper_rpc.proto.leyline.v1 import HardwareContext, SeedState
from esper_servers.policy.graph import BlueprintCandidate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSignals:
    """What is known of a run at one step. None, or a metric that is absent: not known."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    seeds: Sequence[SeedState] = ()
    hardware: HardwareContext | None = None
    grown: Sequence[BlueprintCandidate] = ()
    """The blueprints that live in seeds of the run."""
    loss: float | None = None
    """As told; it may be NaN or infinite."""
    loss_rise: float = 0.0
    """Above the loss of the step before."""
    loss_deviation: float = 0.0
    """Before this step."""
    loss_variance: float = 0.0
    """Where the mean of the loss is above 1, relative to its square."""
    loss_trend: float = 0.0
    """Positive while the loss falls; in the same measure."""
    gradient_volatility: float | None = None
    """Deviation of the norm over its mean, where that is above 1: small gradients may scatter as they like."""
    slow_hooks: int = 0
    """Steps in a row whose hook took too long, with this one."""
    high_steps: int = 0
    """Steps in a row at high risk, before this one."""

    def metric(self, name: str) -> float | None:
        """Return a metric; NaN is as good as absent."""
        value = self.metrics.get(name)
        return value if value == value else None  # Only NaN differs from itself.
