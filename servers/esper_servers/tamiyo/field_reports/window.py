from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .run_trace import RunTrace

CLOSED = "the run was closed"
REOPENED = "another seed host took the run over"
DISPLACED = "newer windows took its place"
EXPIRED = "the run did not reach the epoch"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCommand:
    """What a report says of the command itself."""

    command_id: str
    run_id: str
    seed_id: str = ""
    blueprint_id: str = ""
    policy_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The observation of one command, from its first outcome on."""

    command_id: str
    run_id: str
    receiver_epoch: str
    """In hexadecimal digits."""
    epoch: int
    opened_ns: int
    is_applied: bool
    failure: str = ""
    """Why the command was not carried out, as far as is known."""
    loss: float | None = None
    latencies: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)
    """Of the run, when the window was opened."""
    command: JudgedCommand | None = None
    """None until its record is found."""


@dataclass(frozen=True, slots=True)
class EndedWindow:
    """A window with what its run had come to."""

    window: Window
    trace: RunTrace
    cut_short: str = ""
    """Why it ended before its time, empty when it did not."""
