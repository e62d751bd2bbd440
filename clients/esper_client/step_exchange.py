from __future__ import annotations

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.guard import StepGuard
from esper_rpc.proto.tamiyo.v1 import StepDecision

from .decision_stream import DecisionStream
from .event_loop import LoopThread

MISSED, UNREACHABLE, BREAKER_OPEN = "deadline_missed", "mesh_unreachable", "breaker_open"


class StepExchange:
    """Asks one question at a time and waits for its answer no longer than a budget."""

    def __init__(self, *, thread: LoopThread, budget_seconds: float, breaker: BreakerConfig) -> None:
        self.guard: StepGuard[StepDecision] = StepGuard()
        self._thread = thread
        self._budget_seconds = budget_seconds
        self._breaker = CircuitBreaker(config=breaker)
        self._stream: DecisionStream | None = None
        self.last_answered = 0

    @property
    def is_connected(self) -> bool:
        """Whether a question can be sent."""
        return self._stream is not None and self._stream.is_open

    def start(self, stream: DecisionStream) -> None:
        """Ask over this stream from now on."""
        self._stream = stream
        self._thread.spawn(stream.run())

    def take(self, decision: StepDecision) -> None:
        """Hand over what came; an answer that nobody awaits any more is counted and dropped."""
        self.guard.resolve(decision.sequence, decision)

    def ask(self, sequence: int, raw: bytes) -> tuple[StepDecision | None, str]:
        """Return the answer, or None and why there is none."""
        if self._stream is None or not self._stream.is_open:
            return None, UNREACHABLE
        if not self._breaker.allow():
            return None, BREAKER_OPEN
        started = self.guard.arm(sequence)
        self._thread.loop.call_soon_threadsafe(self._stream.send, sequence, raw)
        decision = self.guard.wait(started, self._budget_seconds)
        if decision is None:
            self._breaker.record_failure()
            return None, MISSED
        self._breaker.record_success()
        self.last_answered = sequence
        return decision, ""
