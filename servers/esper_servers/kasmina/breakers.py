from __future__ import annotations

from collections.abc import Callable

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.proto.leyline.v1 import CircuitState, MetricPoint

from .telemetry.notices import INFO, WARNING, Tell

_TOLD_AS = {
    CircuitState.CIRCUIT_STATE_OPEN: ("breaker_open", WARNING),
    CircuitState.CIRCUIT_STATE_HALF_OPEN: ("breaker_half_open", INFO),
    CircuitState.CIRCUIT_STATE_CLOSED: ("breaker_closed", INFO),
}


class TellingBreaker(CircuitBreaker):
    """A breaker that has a name, tells its moves by it, and shows its state as a metric."""

    def __init__(self, name: str, *, config: BreakerConfig, clock: Callable[[], float], tell: Tell) -> None:
        super().__init__(config=config, clock=clock, on_transition=self._tell_of_move)
        self.name = name
        self._tell = tell

    def metric(self) -> MetricPoint:
        """Return the state, 1 closed, 2 open, 3 half open."""
        return MetricPoint(name="kasmina.breaker.state", value=float(self.state), attributes={"breaker": self.name})

    def _tell_of_move(self, before: CircuitState.ValueType, after: CircuitState.ValueType) -> None:
        name, level = _TOLD_AS[after]
        self._tell(name, level, reason=self.name, breaker=self.name, before=CircuitState.Name(before))
