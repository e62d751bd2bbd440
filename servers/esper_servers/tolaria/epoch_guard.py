from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import structlog

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.config import Range, validate
from esper_rpc.proto.leyline.v1 import CircuitState, TelemetryLevel
from esper_rpc.telemetry.metrics import EPOCH_HOOK, observe_breaker_move

from .conservative_mode import ConservativeMode
from .telemetry import show, tell

log = structlog.get_logger(__name__)

CAUSE = "epoch_guard"
BREAKER = "epoch"
ANSWERED, LATE, SKIPPED, FAILED = "answered", "late", "skipped", "failed"
State = TypeVar("State")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochGuardConfig:
    """What the end of an epoch may cost."""

    budget_ms: Annotated[float, Range(1, 60_000)] = 18.0
    handshake_ms: Annotated[float, Range(0, 60_000)] = 12.0
    """Of that, how long the controller's answer is waited for; one that comes later is dropped."""
    handshake_timeout_seconds: Annotated[float, Range(0.01, 600)] = 2.0
    """When the question itself is given up, off the training thread."""
    breaches: Annotated[int, Range(1, 1000)] = 1
    """Epochs in a row over the budget, or not sound, that open the breaker."""
    cool_down_seconds: Annotated[float, Range(0, 86_400)] = 60.0
    successes: Annotated[int, Range(1, 1000)] = 3
    """Epochs in a row within the budget that close it again."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def breaker(self) -> BreakerConfig:
        """The breaker around it."""
        return BreakerConfig(failures=self.breaches, cool_down_seconds=self.cool_down_seconds, successes=self.successes)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport(Generic[Answer]):
    """Where the time at the end of an epoch went, in milliseconds."""

    epoch: int
    state_ms: float
    handshake_ms: float
    command_ms: float
    total_ms: float
    handshake: str
    """answered, late, skipped or failed."""
    answer: Answer | None
    breached: bool


class EpochGuard:
    """Keeps the end of an epoch within its budget: measures its parts, and waits for no peer beyond it.

    An epoch over the budget or with a broken state counts against a breaker. While that is not closed the trainer is
    in conservative mode; while it is open the controller is not asked at all.
    """

    def __init__(
        self,
        *,
        mode: ConservativeMode,
        config: EpochGuardConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
        breaker_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or EpochGuardConfig()
        self._mode = mode
        self._clock = clock
        self._epoch = 0
        self.late_answers = 0
        """Answers that came after their epoch: counted, never carried out."""
        self.last: EpochReport[object] | None = None
        self.breaker = CircuitBreaker(config=self.config.breaker, clock=breaker_clock, on_transition=self._moved)

    @property
    def handshake_timeout_seconds(self) -> float:
        """How long a question may take off the training thread."""
        return self.config.handshake_timeout_seconds * self._mode.timeout_scale

    def run(
        self,
        epoch: int,
        *,
        assemble: Callable[[], State],
        ask: Callable[[State], Future[Answer]] | None = None,
        process: Callable[[Answer], object] = lambda _answer: None,
        problem: str = "",
    ) -> EpochReport[Answer]:
        """Do the work at the end of an epoch: assemble the state, ask the controller, carry out what it says.

        `ask` must return at once. `problem` says what is wrong with the state itself, for example a loss that is no
        number. Raises only what `assemble` does: the rest is a mesh that fails, which is counted and logged.
        """
        self._epoch = epoch
        is_tried, begun = self.breaker.allow(), self._clock()
        state = assemble()
        assembled = self._clock()
        handshake = SKIPPED
        answer: Answer | None = None
        if ask is not None and is_tried:
            asking = self._ask(ask, state, begun)
            handshake, answer = asking
        asked = self._clock()
        if answer is not None and not self._process(process, answer):
            handshake = FAILED
        ended = self._clock()
        report = EpochReport(
            epoch=epoch,
            state_ms=(assembled - begun) * 1e3,
            handshake_ms=(asked - assembled) * 1e3,
            command_ms=(ended - asked) * 1e3,
            total_ms=(ended - begun) * 1e3,
            handshake=handshake,
            answer=answer,
            breached=(ended - begun) * 1e3 > self.config.budget_ms,
        )
        self._judge(report, problem, is_tried=is_tried)
        return report

    def _ask(self, ask: Callable[[State], Future[Answer]], state: State, begun: float) -> tuple[str, Answer | None]:
        try:
            pending = ask(state)
        except Exception as error:  # noqa: BLE001  # The trainer's loop never sees a mesh exception.
            return self._failed(error), None
        spent_ms = (self._clock() - begun) * 1e3
        left_ms = min(self.config.handshake_ms, self.config.budget_ms - spent_ms)
        try:
            return ANSWERED, pending.result(max(0.0, left_ms) / 1e3)
        except FutureTimeout as error:
            if pending.done() and not pending.cancelled():
                return self._failed(error), None  # The peer's own timeout is a failure of it.
            pending.add_done_callback(self._came_late)
            return LATE, None
        except Exception as error:  # noqa: BLE001  # As above.
            return self._failed(error), None

    def _process(self, process: Callable[[Answer], object], answer: Answer) -> bool:
        try:
            process(answer)
        except Exception as error:  # noqa: BLE001  # As above.
            self._failed(error)
            return False
        return True

    def _failed(self, error: BaseException) -> str:
        log.warning("epoch_handshake_failed", epoch=self._epoch, problem=repr(error)[:200])
        return FAILED

    def _came_late(self, pending: Future[Answer]) -> None:
        if not pending.cancelled() and pending.exception() is None:
            self.late_answers += 1

    def _judge(self, report: EpochReport[Answer], problem: str, *, is_tried: bool) -> None:
        self.last = report  # type: ignore[assignment]  # Any answer will do.
        EPOCH_HOOK.observe(report.total_ms / 1e3)
        show({"tolaria.epoch_hook.latency_ms": report.total_ms})
        if report.breached:
            tell(
                "latency_high", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason="epoch_hook", epoch=report.epoch,
                budget_ms=self.config.budget_ms, spent_ms=round(report.total_ms, 3),
                state_ms=round(report.state_ms, 3), handshake_ms=round(report.handshake_ms, 3),
                command_ms=round(report.command_ms, 3), handshake=report.handshake,
            )  # fmt: skip
        if is_tried:
            (self.breaker.record_failure if report.breached or problem else self.breaker.record_success)()

    def _moved(self, _before: CircuitState.ValueType, after: CircuitState.ValueType) -> None:
        name = CircuitState.Name(after).removeprefix("CIRCUIT_STATE_")
        observe_breaker_move(BREAKER, name.lower())
        if after == CircuitState.CIRCUIT_STATE_CLOSED:
            self._mode.leave(CAUSE)
        else:
            self._mode.enter(CAUSE)
