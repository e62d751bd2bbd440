from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections import Counter, deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, Self

import structlog

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.config import Range, validate
from esper_rpc.guard import StepGuard
from esper_rpc.identity import Identity
from esper_rpc.ledger import StepTiming, TimingWindow
from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateStepsRequest, OpenRunRequest, OpenRunResponse, Step, StepDecision

from .decision_stream import DecisionStream
from .event_loop import LoopThread
from .packet import build_packet
from .seed_host import SeedHost

log = structlog.get_logger(__name__)

PROTOCOL_VERSION = 1
FEATURES = ("seed", "pause", "optimizer")
MISSED, UNREACHABLE, BREAKER_OPEN = "deadline_missed", "mesh_unreachable", "breaker_open"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How a session asks."""

    step_budget_ms: Annotated[float, Range(2, 1000)] = 5.0
    """2 to 50 in training; more only in a benchmark."""
    breaker: BreakerConfig = field(
        default_factory=lambda: BreakerConfig(failures=5, cool_down_seconds=0.5, successes=1)
    )
    optimizer_family: str = ""
    world_size: int = 1

    def __post_init__(self) -> None:
        validate(self)


class Loss(Protocol):
    """A number, or a tensor of one element."""

    def __float__(self) -> float: ...


class TrainingSession:
    """Asks the mesh after every training step and carries out its answer.

    `step` never raises because of the mesh and never waits longer than its budget. Call it from the training thread,
    after optimizer.step().
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
    ) -> None:
        self.host = host
        self.run_id = run_id or f"run-{uuid.uuid4().hex[:12]}"
        self.config = config or SessionConfig()
        self.timings = TimingWindow()
        self.reasons: Counter[str] = Counter()
        """Steps without a command by reason, commands as `command`."""
        self.outcomes: deque[CommandOutcome] = deque(maxlen=1024)
        self.policy_version = ""
        self.kasmina_address = ""
        """Where KasminaService of this process listens, when it is served."""
        self.epoch = 0
        self.global_step = 0
        self._guard: StepGuard[StepDecision] = StepGuard()
        self._breaker = CircuitBreaker(config=self.config.breaker)
        self._unacknowledged: deque[tuple[int, CommandOutcome]] = deque(maxlen=256)
        self._sequence = 0
        self._told_epoch = b""
        self._hook_latency_ms = 0.0
        self._last_step_at: float | None = None
        self._failed = False
        self._thread = thread or LoopThread()
        self._stream = DecisionStream(
            address=tamiyo_address,
            identity=identity,
            describe=self._describe,
            on_decision=lambda decision: self._guard.resolve(decision.sequence, decision),
            on_open=self._on_open,
        )
        self._started = False

    @property
    def is_connected(self) -> bool:
        """Whether the decision stream is open."""
        return self._stream.is_open

    @property
    def guard(self) -> StepGuard[StepDecision]:
        """The step guard, with its counts of misses and late answers."""
        return self._guard

    def step(
        self,
        loss: Loss,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> list[CommandOutcome]:
        """End a training step: ask, verify, and carry out the answer on the model. Returns what became of commands.

        Raises nothing that comes from the mesh; what failed is logged once and counted in `reasons`.
        """
        if self._thread.fork.is_child:
            return []
        try:
            return self._step(_number(loss), samples, gradient_norm, metrics or {})
        except Exception as error:  # The trainer's loop never sees a mesh exception.
            self.reasons["internal_error"] += 1
            if not self._failed:
                log.error("session_step_failed", exc_info=error)
            self._failed = True
            return []

    def start_epoch(self, epoch: int) -> None:
        """Note that an epoch begins."""
        self.epoch = epoch
        self.host.update_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and its optimizer."""
        return {"epoch": self.epoch, "global_step": self.global_step, "host": self.host.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        self.host.load_state_dict(state["host"])

    def export(self) -> Any:
        """Return the model without the mesh."""
        return self.host.export()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine beside the training, on the session's loop."""
        self._thread.spawn(work)

    def close(self) -> None:
        """End the session. The model stays as it is."""
        with contextlib.suppress(Exception):
            self.host.close()
        with contextlib.suppress(Exception):
            self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(
        self, loss: float, samples: int | None, gradient_norm: float | None, metrics: Mapping[str, float]
    ) -> list[CommandOutcome]:
        begun = time.perf_counter()
        self._start()
        self.global_step += 1
        self.host.observe(loss, self.global_step)
        packet = self._packet(loss, samples, gradient_norm, metrics)
        raw = self._request(packet)
        built = time.perf_counter()
        decision = self._ask(raw)
        answered = time.perf_counter()
        outcomes = self._submit(decision, raw) if decision is not None else []
        verified = time.perf_counter()
        outcomes += self._finish()
        ended = time.perf_counter()
        self._remember(outcomes)
        self._tell_of_new_host()
        self._time(begun, built, answered, verified, ended, decision)
        return outcomes

    def _start(self) -> None:
        # Only now: after the first forward the sites know their shapes.
        if not self._started:
            self._started = True
            self._thread.spawn(self._stream.run())

    def _packet(
        self, loss: float, samples: int | None, gradient_norm: float | None, metrics: Mapping[str, float]
    ) -> SystemStatePacket:
        known = {"hook_latency_ms": self._hook_latency_ms, **metrics}
        if gradient_norm is not None:
            known["gradient_norm"] = gradient_norm
        now = time.monotonic()
        if samples is not None and self._last_step_at is not None:
            known["samples_per_s"] = samples / max(1e-9, now - self._last_step_at)
        self._last_step_at = now
        return build_packet(
            run_id=self.run_id,
            epoch=self.epoch,
            global_step=self.global_step,
            loss=loss,
            metrics=known,
            seeds=self.host.export_seed_states(),
        )

    def _request(self, packet: SystemStatePacket) -> bytes:
        # A host in another process may have answered an earlier session of this run.
        self._sequence = max(self._sequence, self.host.last_sequence) + 1
        step = Step(
            run_id=self.run_id,
            sequence=self._sequence,
            budget_us=int(self.config.step_budget_ms * 1000),
            packet=packet,
            outcomes=[outcome for _, outcome in self._unacknowledged],
        )
        return EvaluateStepsRequest(step=step).SerializeToString()

    def _ask(self, raw: bytes) -> StepDecision | None:
        if not self._stream.is_open:
            self.reasons[UNREACHABLE] += 1
            return None
        if not self._breaker.allow():
            self.reasons[BREAKER_OPEN] += 1
            return None
        sequence = self._sequence
        started = self._guard.arm(sequence)
        self._thread.loop.call_soon_threadsafe(self._stream.send, raw)
        decision = self._guard.wait(started, self.config.step_budget_ms / 1000)
        if decision is None:
            self._breaker.record_failure()
            self.reasons[MISSED] += 1
            return None
        self._breaker.record_success()
        self._acknowledge(sequence)
        return decision

    def _submit(self, decision: StepDecision, raw: bytes) -> list[CommandOutcome]:
        kind = decision.WhichOneof("decision")
        if kind != "command":
            self.reasons[decision.no_action.reason if kind == "no_action" else f"error_{decision.error.code}"] += 1
            return []
        self.reasons["command"] += 1
        digest = hashlib.sha256(raw).digest()
        return [self.host.submit(decision.command, expected_sequence=decision.sequence, request_digest=digest)]

    def _finish(self) -> list[CommandOutcome]:
        outcomes = self.host.apply_pending()
        self.host.advance_alphas()
        self.host.finalize_step(self.global_step)
        return outcomes

    def _remember(self, outcomes: list[CommandOutcome]) -> None:
        for outcome in outcomes:
            self.outcomes.append(outcome)
            self._unacknowledged.append((self._sequence, outcome))

    def _tell_of_new_host(self) -> None:
        if self._stream.is_open and self.host.receiver_epoch != self._told_epoch:
            self._thread.loop.call_soon_threadsafe(self._stream.reopen)

    def _acknowledge(self, sequence: int) -> None:
        # What this request carried was remembered in an earlier step.
        while self._unacknowledged and self._unacknowledged[0][0] < sequence:
            self._unacknowledged.popleft()

    def _time(
        self,
        begun: float,
        built: float,
        answered: float,
        verified: float,
        ended: float,
        decision: StepDecision | None,
    ) -> None:
        self._hook_latency_ms = (ended - begun) * 1e3
        self.timings.add(
            StepTiming(
                build=(built - begun) * 1e6,
                exchange=(answered - built) * 1e6,
                server=float(decision.ledger.total_us) if decision is not None else 0.0,
                verify=(verified - answered) * 1e6,
                apply=(ended - verified) * 1e6,
                total=(ended - begun) * 1e6,
            )
        )

    def _describe(self) -> OpenRunRequest:
        run = self.host.describe()
        self._told_epoch = self.host.receiver_epoch
        return OpenRunRequest(
            run_id=self.run_id,
            protocol_versions=[PROTOCOL_VERSION],
            features=FEATURES,
            receiver_epoch=self._told_epoch,
            host_topology=run.host_topology,
            sites=run.sites,
            seeds=run.seeds,
            optimizer_family=self.config.optimizer_family,
            world_size=self.config.world_size,
            step_budget_us=int(self.config.step_budget_ms * 1000),
            last_sequence=self._sequence,
        )

    def _on_open(self, response: OpenRunResponse, offset_ns: int) -> None:
        self.policy_version = response.policy_version
        self.host.set_clock_offset(offset_ns)


def _number(loss: Loss) -> float:
    """Read a number, or a tensor of one element without its graph."""
    return float(loss.detach() if hasattr(loss, "detach") else loss)
