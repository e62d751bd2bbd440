from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket
from esper_servers.policy.graph import BlueprintCandidate

from .config import RiskConfig
from .step_signals import StepSignals
from .window import MovingWindow


@dataclass(slots=True)
class RiskHistory:
    """What the judgement of a run remembers from step to step."""

    loss: MovingWindow = field(default_factory=MovingWindow)
    gradient: MovingWindow = field(default_factory=MovingWindow)
    slow_hooks: int = 0
    high_steps: int = 0
    told: dict[str, int] = field(default_factory=dict)
    """The step at which each reason was last logged."""
    adjusted: bool = False
    """Whether the optimizer was adjusted since the run was last nominal."""
    loss_rise: float = 0.0
    """Of the last step; only told, nothing is decided by it later."""

    def observe(
        self,
        packet: SystemStatePacket,
        seeds: Sequence[SeedState],
        grown: Sequence[BlueprintCandidate],
        config: RiskConfig,
    ) -> StepSignals:
        """Take in the packet of one step."""
        metrics = dict(packet.training_metrics)  # A look-up in the message's map costs five times one in a dict.
        loss = metrics.get("loss", packet.training_loss if packet.HasField("training_loss") else None)
        deviation = self.loss.deviation
        rise = self.loss_rise = self.loss.update(math.nan if loss is None else loss)
        self.gradient.update(metrics.get("gradient_norm", math.nan))
        slow = metrics.get("hook_latency_ms", 0.0) > config.hook_latency_ms
        self.slow_hooks = self.slow_hooks + 1 if slow else 0
        scale = self.loss.scale
        return StepSignals(
            metrics=metrics,
            seeds=seeds,
            hardware=packet.hardware_context if packet.HasField("hardware_context") else None,
            grown=grown,
            loss=loss,
            loss_rise=rise,
            loss_deviation=deviation,
            loss_variance=self.loss.variance / (scale * scale),
            loss_trend=self.loss.trend / scale,
            gradient_volatility=None if self.gradient.fast is None else self.gradient.deviation / self.gradient.scale,
            slow_hooks=self.slow_hooks,
            high_steps=self.high_steps,
        )

    def settle(self, *, is_high: bool, is_nominal: bool) -> None:
        """Take in the verdict on it."""
        self.high_steps = self.high_steps + 1 if is_high else 0
        if is_nominal:
            self.adjusted = False
