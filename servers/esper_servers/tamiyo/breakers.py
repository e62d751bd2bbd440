from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.proto.leyline.v1 import CircuitState, TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import observe_breaker_move

from .conservative_mode import ConservativeMode
from .risk.events import SOURCE

INFERENCE, URZA, FIELD_REPORTS = "inference", "urza", "field_reports"
POLICY_UPDATES, JOURNAL, STATE_FILES = "policy_updates", "journal", "state_files"
CONFIGS: Mapping[str, BreakerConfig] = {
    INFERENCE: BreakerConfig(),
    URZA: BreakerConfig(failures=3, cool_down_seconds=30.0, successes=1),
    FIELD_REPORTS: BreakerConfig(failures=3, cool_down_seconds=30.0, successes=1),
    POLICY_UPDATES: BreakerConfig(failures=3, cool_down_seconds=30.0, successes=1),
    # What cannot be written meanwhile is lost, so the disk is asked again soon.
    JOURNAL: BreakerConfig(failures=3, cool_down_seconds=1.0, successes=1),
    STATE_FILES: BreakerConfig(failures=3, cool_down_seconds=30.0, successes=1),
}
"""How many failures in a row are tolerated of what, and how long it is left alone after them."""


class Breakers:
    """The breakers of a controller, by what they guard. Each move is told; one that opens holds the policy back."""

    def __init__(self, mode: ConservativeMode, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._mode = mode
        self._clock = clock
        self._watchers: dict[str, Callable[[CircuitState.ValueType], None]] = {}
        self._breakers = {name: self._made(name) for name in CONFIGS}

    def __getitem__(self, name: str) -> CircuitBreaker:
        return self._breakers[name]

    def all(self) -> dict[str, CircuitBreaker]:
        """Every breaker by its name."""
        return dict(self._breakers)

    def renew(self, name: str) -> CircuitBreaker:
        """Put a closed breaker in the place of one, because what it guards is another thing now."""
        self._breakers[name] = self._made(name)
        return self._breakers[name]

    def watch(self, name: str, watcher: Callable[[CircuitState.ValueType], None]) -> None:
        """Call this with the new state at every move, on the thread that causes it."""
        self._watchers[name] = watcher

    def _made(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(config=CONFIGS[name], clock=self._clock, on_transition=partial(self._moved, name))

    def _moved(self, name: str, before: CircuitState.ValueType, after: CircuitState.ValueType) -> None:
        observe_breaker_move(name, _named(after).lower())
        reason = f"{name}_breaker_{_named(after).lower()}"
        tell_event(
            SOURCE, "breaker_moved", _level_of(before, after), reason=reason, breaker=name, before=_named(before),
            after=_named(after),
        )  # fmt: skip
        if after == CircuitState.CIRCUIT_STATE_OPEN:
            self._mode.enter(reason, until=lambda: not self._is_open(name))
        if name in self._watchers:
            self._watchers[name](after)

    def _is_open(self, name: str) -> bool:
        return self._breakers[name].state == CircuitState.CIRCUIT_STATE_OPEN


def _level_of(before: CircuitState.ValueType, after: CircuitState.ValueType) -> TelemetryLevel.ValueType:
    """One that was closed and opens is for somebody to see; that it still fails when it is tried is known then."""
    if after != CircuitState.CIRCUIT_STATE_OPEN:
        return TelemetryLevel.TELEMETRY_LEVEL_INFO
    was_closed = before == CircuitState.CIRCUIT_STATE_CLOSED
    return TelemetryLevel.TELEMETRY_LEVEL_ERROR if was_closed else TelemetryLevel.TELEMETRY_LEVEL_WARNING


def _named(state: CircuitState.ValueType) -> str:
    return CircuitState.Name(state).removeprefix("CIRCUIT_STATE_")
