from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from .config import Range, validate
from .proto.leyline.v1 import CircuitState

# An enum of protobuf looks a value up by its name in Python: two microseconds each time.
CLOSED, OPEN, HALF_OPEN = (
    CircuitState.CIRCUIT_STATE_CLOSED, CircuitState.CIRCUIT_STATE_OPEN, CircuitState.CIRCUIT_STATE_HALF_OPEN,
)  # fmt: skip
_MOVABLE = frozenset(CircuitState.values()) - {CircuitState.CIRCUIT_STATE_UNSPECIFIED}
Transition = Callable[[CircuitState.ValueType, CircuitState.ValueType], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerConfig:
    """When a breaker opens and closes (C-30)."""

    failures: Annotated[int, Range(1, 1000)] = 5
    cool_down_seconds: Annotated[float, Range(0, 3600)] = 60.0
    successes: Annotated[int, Range(1, 1000)] = 3

    def __post_init__(self) -> None:
        validate(self)


class CircuitBreaker:
    """Stops calling what fails. While half-open it lets one real call through at a time."""

    def __init__(
        self,
        *,
        config: BreakerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_transition: Transition = lambda _before, _after: None,
    ) -> None:
        self._config = config or BreakerConfig()
        self._clock = clock
        self._on_transition = on_transition
        self._lock = threading.Lock()
        self._state: CircuitState.ValueType = CLOSED
        self._opened_at = 0.0
        self._successes = 0
        self._probing = False
        self.consecutive_failures = 0

    @property
    def state(self) -> CircuitState.ValueType:
        """The state, after the passing of time."""
        with self._lock:
            self._cool_down()
            return self._state

    def allow(self) -> bool:
        """Whether a call may be made; each True must be followed by a recorded success or failure, or be let go."""
        with self._lock:
            self._cool_down()
            if self._state == HALF_OPEN:
                allowed, self._probing = not self._probing, True
                return allowed
            return self._state == CLOSED

    def record_success(self) -> None:
        """Note that an allowed call succeeded."""
        with self._lock:
            self.consecutive_failures = 0
            self._probing = False
            if self._state == HALF_OPEN:
                self._successes += 1
                if self._successes >= self._config.successes:
                    self._move(CLOSED)

    def record_failure(self) -> None:
        """Note that an allowed call failed."""
        with self._lock:
            self.consecutive_failures += 1
            self._probing = False
            half_open = self._state == HALF_OPEN
            if half_open or self.consecutive_failures >= self._config.failures:
                self._opened_at = self._clock()
                self._move(OPEN)

    def let_go(self) -> None:
        """Note that an allowed call was given up, which says nothing about whom it was for."""
        with self._lock:
            self._probing = False

    def move_to(self, state: CircuitState.ValueType) -> None:
        """Put it into a state from outside; it goes on from there as if it had come to it by itself."""
        if state not in _MOVABLE:
            raise ValueError(f"state is {state}; choose closed, open or half open.")
        with self._lock:
            self._successes, self._probing = 0, False
            if state == CLOSED:
                self.consecutive_failures = 0
            self._opened_at = self._clock()
            self._move(state)

    def _cool_down(self) -> None:
        is_open = self._state == OPEN
        if is_open and self._clock() - self._opened_at >= self._config.cool_down_seconds:
            self._successes = 0
            self._probing = False
            self._move(HALF_OPEN)

    def _move(self, state: CircuitState.ValueType) -> None:
        before, self._state = self._state, state
        if before != state:
            self._on_transition(before, state)
