from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from google.rpc.status_pb2 import Status

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.errors import ResourceExhausted
from esper_rpc.guard import StepGuard
from esper_rpc.proto.tamiyo.v1 import StepDecision, StepStatus
from esper_rpc.status import from_status

from .decision_stream import DecisionStream
from .event_loop import LoopThread

MISSED, UNREACHABLE, BREAKER_OPEN, PUSHED_BACK = (
    "deadline_missed", "mesh_unreachable", "breaker_open", "pushed_back",
)  # fmt: skip
LONGEST_PUSHBACK_SECONDS = 10.0
LATE_COMMANDS_KEPT = 64
LONGEST_COMMAND_ID = 128
LEADS = 8
LONGEST_BUDGET_SECONDS = 0.05


class StepExchange:
    """Asks one question at a time and waits for its answer no longer than a budget."""

    def __init__(
        self,
        *,
        thread: LoopThread,
        budget_seconds: float,
        breaker: BreakerConfig,
        on_sent: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guard: StepGuard[StepDecision] = StepGuard(clock)
        self._clock = clock
        self._thread = thread
        self._budget_seconds = budget_seconds
        self._on_sent = on_sent
        self._breaker = CircuitBreaker(config=breaker)
        self._stream: DecisionStream | None = None
        self._not_before = 0.0
        self._last_command = ""
        self._late_commands: deque[str] = deque(maxlen=LATE_COMMANDS_KEPT)
        self._sequence, self._sent_at = 0, 0.0
        self._leads: deque[float] = deque([0.0], maxlen=LEADS)
        self.last_answered = 0

    @property
    def is_connected(self) -> bool:
        """Whether a question can be sent."""
        return self._stream is not None and self._stream.is_open

    @property
    def useful_seconds(self) -> float:
        """How long after it was sent the answer to the next question will be of use.

        A loop that asks before its backward pass comes for the answer later than it would wait for it: at the
        earliest after the shortest of the last leads.
        """
        return max(self._budget_seconds, min(LONGEST_BUDGET_SECONDS, *self._leads))

    def start(self, stream: DecisionStream) -> None:
        """Ask over this stream from now on."""
        self._stream = stream
        self._thread.spawn(stream.run())

    def take(self, decision: StepDecision) -> None:
        """Hand over what came; of an answer that nobody awaits any more only the id of its command is kept."""
        is_in_time = self.guard.resolve(decision.sequence, decision)
        if not decision.HasField("command"):
            return
        command_id = decision.command.nonce[:LONGEST_COMMAND_ID]
        # A step that was sent again is answered twice alike, and the first answer may have been in time.
        if not is_in_time and command_id != self._last_command:
            self._late_commands.append(command_id)
        self._last_command = command_id

    def take_late_commands(self) -> list[str]:
        """Return the ids of the commands that came too late since the last call."""
        return [self._late_commands.popleft() for _ in range(len(self._late_commands))]

    def send(self, sequence: int, raw: bytes) -> str:
        """Send a question; why that cannot be, empty when it was done. `receive` must follow then."""
        if self._stream is None or not self._stream.is_open:
            return UNREACHABLE
        if self._clock() < self._not_before:
            return PUSHED_BACK
        if not self._breaker.allow():
            return BREAKER_OPEN
        self._sequence, self._sent_at = sequence, self.guard.arm(sequence)
        self._thread.loop.call_soon_threadsafe(self._send, self._stream, sequence, raw)
        return ""

    def _send(self, stream: DecisionStream, sequence: int, raw: bytes) -> None:
        stream.send(sequence, raw)
        self._on_sent()

    def receive(self) -> StepDecision | None:
        """Return the answer to what was sent last, waiting for it until the budget has passed since; None is a miss."""
        self._leads.append(self._clock() - self._sent_at)
        decision = self.guard.wait(self._sent_at, self._budget_seconds)
        if decision is None:
            self._breaker.record_failure()
            return None
        self._breaker.record_success()
        self.last_answered = self._sequence
        if decision.HasField("error"):
            self._heed(decision.error)
        return decision

    def _heed(self, status: StepStatus) -> None:
        """An overloaded server says when to ask again; asking sooner would only cost both sides."""
        error = from_status(Status.FromString(status.SerializeToString()))
        if isinstance(error, ResourceExhausted):
            self._not_before = self._clock() + min(error.retry_after_ms / 1000, LONGEST_PUSHBACK_SECONDS)
