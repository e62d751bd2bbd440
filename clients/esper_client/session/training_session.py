from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Self, TypeVar

import structlog
from opentelemetry import trace

from esper_client.connection import StepConnection
from esper_client.decision_stream import DecisionStream
from esper_client.event_loop import LoopThread
from esper_client.halt import HaltSwitch
from esper_client.seed_host import OutOfStep, SeedHost
from esper_client.step_exchange import StepExchange
from esper_rpc.guard import StepGuard
from esper_rpc.identity import Identity
from esper_rpc.ledger import TimingWindow
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, OpenRunRequest, StepDecision, StepLedger
from esper_rpc.telemetry import PacketSink
from esper_rpc.telemetry.tracing import TRACER

from .answers import Answers
from .config import SessionConfig
from .loss import BadArgument, Loss, read_epoch
from .questions import Measured, Questions, measure
from .state import read_state, write_state
from .step_report import trace_step
from .step_reports import StepReports
from .step_times import StepTimes

log = structlog.get_logger(__name__)

FEATURES = ("seed", "pause", "optimizer")
CLOSE_SECONDS = 5.0
StepListener = Callable[[int, int, Mapping[str, float]], None]

Result = TypeVar("Result")


class _BegunStep(NamedTuple):
    """A step whose answer is on its way."""

    span: trace.Span
    question: bytes
    unsent: str
    """Why it was not sent, empty when it was."""
    outcomes: list[CommandOutcome]
    times: StepTimes


class TrainingSession:
    """Asks the mesh after every training step and carries out its answer.

    `step` never raises because of the mesh and never waits longer than its budget. Call it from the training thread,
    after optimizer.step(). Or call `begin_step` when the loss is known and `finish_step` there: the mesh then decides
    while backward and optimizer work.
    """

    def __init__(
        self,
        *,
        host: SeedHost,
        identity: Identity,
        tamiyo_address: str,
        run_id: str = "",
        config: SessionConfig | None = None,
        thread: LoopThread | None = None,
        telemetry: PacketSink | None = None,
    ) -> None:
        self.host = host
        self.run_id = run_id or f"run-{uuid.uuid4().hex[:12]}"
        self.config = config or SessionConfig()
        self.timings = TimingWindow()
        self.last_ledger = StepLedger()
        """Tamiyo's own account of the last step; empty when that had no answer."""
        self.reasons: Counter[str] = Counter()
        """Steps without a command by reason, commands as `command`."""
        self.outcomes: deque[CommandOutcome] = deque(maxlen=1024)
        self.policy_version = ""
        self.features: tuple[str, ...] = FEATURES
        """What Tamiyo may ask for; set before the first step."""
        self.checkpoints: Any = None
        """What keeps checkpoints of this run, where the trainer runtime does: its Checkpoints."""
        self.after_step: Callable[[], None] = lambda: None
        """Called by the training thread when a step is done; what it raises ends in the log."""
        self.kasmina_address = ""
        """Where KasminaService of this process listens, when it is served."""
        self.tolaria: Any = None
        """What the trainer runtime keeps beside this session, when it serves one."""
        self.epoch = 0
        self.global_step = 0
        self.halt = HaltSwitch()
        self.apply_ms = 0.0
        """How long the seed host took to carry out commands in the last step."""
        self.finalize_ms = 0.0
        """How long it took to end the last step."""
        self._step_listeners: list[StepListener] = []
        self._failed: set[str] = set()
        """Arguments that were bad, empty for a fault of ours."""
        self._begun: _BegunStep | None = None
        self._is_in_step = False
        self._thread = thread or LoopThread()
        self._reports = StepReports(self.run_id)
        self._telemetry = telemetry or self._reports.add_packets
        self._exchange = StepExchange(
            thread=self._thread,
            budget_seconds=self.config.step_budget_ms / 1000,
            breaker=self.config.breaker,
            on_sent=self._reports.question_sent,
        )
        self._questions = Questions(run_id=self.run_id, host=host, config=self.config)
        self._answers = Answers(host=host, questions=self._questions, exchange=self._exchange, reasons=self.reasons)
        self._stream = DecisionStream(
            address=tamiyo_address,
            identity=identity,
            describe=self._describe,
            on_decision=self._exchange.take,
            on_open=self._on_open,
            is_awaited=self._exchange.guard.awaits,
        )
        self._started = False
        self._closing: list[Callable[[], Coroutine[Any, Any, Any]]] = []

    @property
    def is_connected(self) -> bool:
        """Whether the decision stream is open."""
        return self._exchange.is_connected

    @property
    def halted(self) -> bool:
        """Whether the run was halted: `step` then does nothing, and the loop should stop or call `hold`."""
        return self.halt.check()

    def hold(self, timeout: float | None = None) -> bool:
        """Stay here while the run is halted; whether it may go on. For the training thread."""
        return self.halt.hold(timeout)

    @property
    def streams_opened(self) -> int:
        """How often a decision stream was opened: one and no more while nothing breaks."""
        return self._stream.opened

    @property
    def guard(self) -> StepGuard[StepDecision]:
        """The step guard, with its counts of misses and late answers."""
        return self._exchange.guard

    def step(
        self,
        loss: Loss,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> list[CommandOutcome]:
        """End a training step: ask, verify, and carry out the answer on the model. Returns what became of commands.

        A command that came too late for its step is never carried out; the step after it returns it as RESULT_LATE.
        Raises nothing that comes from the mesh; what failed is logged once and counted in `reasons`. While the run is
        halted nothing is asked and nothing of the mesh changes the model. Where several ranks train one model every
        rank calls it, and it raises OutOfStep when the other ranks are gone.
        """
        self.begin_step(loss, samples=samples, gradient_norm=gradient_norm, metrics=metrics)
        return self.finish_step()

    def begin_step(
        self,
        loss: Loss,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Ask as soon as the loss is known, so that the mesh decides while backward and optimizer work.

        `finish_step` must follow, after optimizer.step(). A step that was begun and not finished is finished first.
        Reading the loss of a CUDA tensor waits for the device, as it does in `step`.
        """
        if self._thread.fork.is_child:
            return
        if self._is_in_step:
            self.finish_step()
        is_halted = self._is_halted()
        if is_halted:
            self._answers.count("halted")
            if self.config.world_size == 1:
                return
        self._is_in_step = True
        self.global_step += 1
        if is_halted:
            return
        try:
            self._begun = self._begin(measure(loss, samples, gradient_norm, metrics))
        except Exception as error:  # noqa: BLE001  # The trainer's loop never sees a mesh exception.
            self._note_failure(error)

    def finish_step(self) -> list[CommandOutcome]:
        """Take the answer to the step that was begun, and carry it out. As `step` otherwise."""
        begun, self._begun = self._begun, None
        is_in_step, self._is_in_step = self._is_in_step, False
        if not is_in_step or self._thread.fork.is_child:
            return []
        outcomes: list[CommandOutcome] = []
        try:
            if begun is None:
                return self._end_for_others()
            with trace.use_span(begun.span, end_on_exit=True):
                outcomes = self._complete(begun)
            self.after_step()
        except OutOfStep:
            raise
        except Exception as error:  # noqa: BLE001  # The trainer's loop never sees a mesh exception.
            self._note_failure(error)
        return outcomes

    def describe_epoch(self, loss: Loss, metrics: Mapping[str, float] | None = None) -> EvaluateEpochRequest:
        """Build the question for the end of an epoch; on the training thread, between two steps."""
        measured = measure(loss, metrics=metrics)
        return self._questions.epoch(self._questions.packet(measured, epoch=self.epoch, global_step=self.global_step))

    def ask_epoch(self, question: EvaluateEpochRequest, *, timeout: float = 2.0) -> Future[StepDecision]:
        """Ask Tamiyo beside the training, and return at once."""
        return asyncio.run_coroutine_threadsafe(self._stream.ask_epoch(question, timeout), self._thread.loop)

    def take_epoch(self, question: EvaluateEpochRequest, decision: StepDecision) -> None:
        """Verify what Tamiyo answered, and carry it out in the next step, before which no other step may be asked."""
        self._answers.keep(self._answers.submit(decision, question.SerializeToString()))

    def start_epoch(self, epoch: int) -> None:
        """Note that an epoch begins. What is no number of one is told as `bad_argument`, and that of before goes on."""
        try:
            self.epoch = read_epoch(epoch)
            self.host.update_epoch(self.epoch)
        except Exception as error:  # noqa: BLE001  # The trainer's loop never sees a mesh exception.
            self._note_failure(error)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and its optimizer."""
        return write_state(self, self.host.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, also that of a session without a mesh."""
        read_state(self, self.host, state)

    def export(self) -> Any:
        """Return the model without the mesh."""
        return self.host.export()

    def move(self) -> None:
        """Move to a new connection without a pause, for example with a renewed certificate; call it on the loop."""
        self._stream.replace()

    def open_again(self) -> None:
        """Have Tamiyo told of the run as it is, on a new connection; returns at once."""
        self._thread.loop.call_soon_threadsafe(self._stream.replace)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine beside the training, on the session's loop."""
        self._thread.spawn(work)

    def listen(self, listener: StepListener) -> None:
        """Call a function with the step, the epoch and the metrics of each packet; it must not wait."""
        self._step_listeners.append(listener)

    def close_with(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Have something that runs beside the training ended with the session, on its loop."""
        self._closing.append(work)

    def close(self) -> None:
        """End the session. The model stays as it is."""
        with contextlib.suppress(Exception):
            self.host.close()
        for work in self._closing:
            with contextlib.suppress(Exception):
                self._thread.run(work(), timeout=CLOSE_SECONDS)
        self._closing.clear()
        with contextlib.suppress(Exception):
            self._thread.stop()
        with contextlib.suppress(Exception):
            self._reports.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, measured: Measured) -> _BegunStep:
        times = StepTimes(begun=time.perf_counter())
        self._start()
        outcomes = self._answers.take_late(self.global_step)
        self.host.observe(measured.loss, self.global_step)
        span = TRACER.start_span("esper.step")
        with trace.use_span(span):
            packet = self._questions.packet(measured, epoch=self.epoch, global_step=self.global_step)
            question = self._questions.step(packet, budget_seconds=self._exchange.useful_seconds)
        for listener in self._step_listeners:
            listener(self.global_step, self.epoch, packet.training_metrics)
        times.built = time.perf_counter()
        unsent = self._exchange.send(self._questions.sequence, question)
        times.sent = time.perf_counter()
        return _BegunStep(span, question, unsent, outcomes, times)

    def _complete(self, step: _BegunStep) -> list[CommandOutcome]:
        times = step.times
        times.resumed = time.perf_counter()
        decision = self._guarded(lambda: self._answers.receive(step.unsent, global_step=self.global_step))
        times.answered = time.perf_counter()
        # What came for a run that was halted meanwhile is dropped.
        taken = None if self.halt.is_engaged else decision
        settled = self._guarded(lambda: self._answers.submit(taken, step.question) if taken is not None else []) or []
        times.verified = time.perf_counter()
        settled += self._end_for_others() if self.halt.is_engaged else self._finish()
        times.ended = time.perf_counter()
        self._answers.keep(settled)
        outcomes = step.outcomes + settled
        self.outcomes += outcomes
        self._tell_of_new_host()
        trace_step(self.run_id, self.global_step, outcomes, times.apply_seconds)
        self._questions.tamiyo_latency_ms = None if step.unsent else times.exchange_seconds * 1e3
        self._account(times, decision, outcomes)
        if step.unsent:
            # No answer follows during which the loop would write it.
            self._reports.write()
        return outcomes

    def _account(self, times: StepTimes, decision: StepDecision | None, outcomes: list[CommandOutcome]) -> None:
        self._questions.hook_latency_ms = times.hook_seconds * 1e3
        self.last_ledger = decision.ledger if decision is not None else StepLedger()
        timing = times.timing(float(self.last_ledger.total_us))
        self.timings.add(timing)
        self._reports.add(self.global_step, timing, outcomes)

    def _guarded(self, work: Callable[[], Result]) -> Result | None:
        """Do what may fail without keeping the host from ending its step, which other ranks wait for."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  # The trainer's loop never sees a mesh exception.
            self._note_failure(error)
            return None

    def _is_halted(self) -> bool:
        try:
            return self.halt.check()
        except Exception as error:  # noqa: BLE001  # As above.
            self._note_failure(error)
            return self.halt.is_engaged

    def _end_for_others(self) -> list[CommandOutcome]:
        """End a step in which nothing was asked: a halted run stands still, unless other ranks wait for this one."""
        return [] if self.halt.is_engaged and self.config.world_size == 1 else self._finish()

    def _note_failure(self, error: Exception) -> None:
        argument = error.argument if isinstance(error, BadArgument) else ""
        self._answers.count("bad_argument" if argument else "internal_error")
        if argument not in self._failed:
            log.error("session_step_failed", problem=str(error), exc_info=None if argument else error)
        self._failed.add(argument)

    def _start(self) -> None:
        # Only now: after the first forward the sites know their shapes.
        if not self._started:
            self._started = True
            self._exchange.start(self._stream)

    def _finish(self) -> list[CommandOutcome]:
        begun = time.perf_counter()
        outcomes = self.host.apply_pending()
        applied = time.perf_counter()
        self.host.advance_alphas()
        packets = self.host.finalize_step(self.global_step)
        self._questions.learn(packets)
        self._telemetry(packets)
        self.apply_ms, self.finalize_ms = (applied - begun) * 1e3, (time.perf_counter() - applied) * 1e3
        return outcomes

    def _tell_of_new_host(self) -> None:
        if self._exchange.is_connected and not self._questions.is_host_told:
            self.open_again()

    def _describe(self) -> OpenRunRequest:
        return self._questions.run(self.features, last_sequence=self._exchange.last_answered)

    def _on_open(self, connection: StepConnection) -> None:
        self.policy_version = connection.run.policy_version
        self.host.set_clock_offset(connection.server_clock_offset_ns)
