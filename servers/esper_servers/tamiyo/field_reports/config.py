from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """How long a command is observed, and what is done with the report on it."""

    window_epochs: Annotated[int, Range(1, 10_000)] = 3
    max_windows: Annotated[int, Range(1, 10_000)] = 1_024
    """Commands observed at once; one more ends the oldest window of the run that has the most."""
    attempts: Annotated[int, Range(1, 100)] = 3
    backoff_seconds: Annotated[float, Range(0.01, 3600)] = 1.0
    backoff_multiplier: Annotated[float, Range(1, 10)] = 2.0
    ack_seconds: Annotated[float, Range(0.01, 3600)] = 2.0
    """How long handing over may take, and how long an acknowledgement is waited for after it."""
    max_pending: Annotated[int, Range(1, 1_000_000)] = 4_096
    """Reports held in memory for the publisher."""
    max_reports: Annotated[int, Range(1, 10_000_000)] = 100_000
    """Reports in the journal."""
    retention_seconds: Annotated[float, Range(60, 31_536_000)] = 86_400.0

    def __post_init__(self) -> None:
        validate(self)
