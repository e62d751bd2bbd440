from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalLimits:
    """What the host refuses whoever signed it: protection against a mesh that is lying."""

    live_seeds: Annotated[int, Range(0, 10_000)] = 8
    added_parameters: Annotated[int, Range(0, 10**12)] = 10_000_000
    learning_rate_multiplier: tuple[float, float] = (0.1, 2.0)
    pauses_per_minute: Annotated[int, Range(0, 10_000)] = 10
    rollbacks_per_epoch: Annotated[int, Range(0, 10_000)] = 2
    """Those that the mesh asks for."""

    def __post_init__(self) -> None:
        validate(self)
        least, most = self.learning_rate_multiplier
        if not 0 < least <= 1 <= most <= 100:
            raise ConfigError(
                f"learning_rate_multiplier = {least:g}, {most:g} is out of range;"
                " allowed is 0 < least <= 1 <= most <= 100."
            )
