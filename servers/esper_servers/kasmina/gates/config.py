from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What a seed must show, and for how long one that was culled stays away."""

    output_drift: Annotated[float, Range(0, 10)] = 0.12
    """By what share the strength of its output may change within eight steps of blending."""
    hook_ms: Annotated[float, Range(0.001, 60_000)] = 50.0
    """What it may take of a forward pass: the median of eight steps."""
    loss_tolerance: Annotated[float, Range(0, 10)] = 0.1
    """By what share of the loss before the graft the loss may be worse when the seed becomes a fossil."""
    loss_margin: Annotated[float, Range(0, 1_000)] = 0.02
    """Beside the share, so that a loss near zero is not judged by its noise."""
    loss_patience: Annotated[int, Range(0, 1_000_000)] = 128
    """How many steps in a row it may be worse by that, until a grafted seed is taken out; 0 for any number."""
    stage_patience: Annotated[int, Range(0, 1_000_000_000)] = 200
    """How many steps a grafted seed may stay in a stage until it is taken out; 0 for any number."""
    least_coverage: Annotated[float, Range(0, 1)] = 0.0
    """What share of the features must have been known to whoever decided."""
    embargo_seconds: Annotated[float, Range(0, 86_400)] = 5.0

    def __post_init__(self) -> None:
        validate(self)
