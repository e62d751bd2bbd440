from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import structlog
import torch
from torch import Tensor

from esper_client.halt import HaltSwitch
from esper_client.seed_host import OutOfStep
from esper_client.session import read_loss
from esper_rpc.errors import EsperError, FailedPrecondition, NotFound
from esper_rpc.proto.leyline.v1 import CommandOutcome, TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, StepDecision
from esper_rpc.telemetry.metrics import EPOCH_DURATION

from .aggregation.aggregator import Aggregated, GradientAggregator
from .aggregation.layer_norms import Seeds, as_points, layer_norms
from .aggregation.losses import backward as aggregate
from .aggregation.weights import SeedLoss
from .checkpoints.keeper import CheckpointKeeper
from .conservative_mode import ConservativeMode
from .emergency.emergencies import Emergencies
from .emergency.escalation import Escalation, Trigger
from .emergency.levels import ELEVATED, HALT, NOTICE
from .epoch_guard import EpochGuard, EpochReport
from .metrics.profiling import StepProfiler
from .metrics.step_metrics import StepMetrics
from .telemetry import SOURCE, show, show_points, tell
from .train_step import StepResult, TrainStep

log = structlog.get_logger(__name__)

STEPS_BETWEEN_EVENTS = 50
CALM = "calm"
INFO = TelemetryLevel.TELEMETRY_LEVEL_INFO


class Controller(Protocol):
    """Whom the trainer asks at the end of an epoch. A TrainingSession is one."""

    @property
    def is_connected(self) -> bool:
        """Whether there is anybody to ask."""
        ...

    def describe_epoch(self, loss: Any, metrics: Mapping[str, float] | None = None) -> EvaluateEpochRequest:
        """Build the question."""
        ...

    def ask_epoch(self, question: EvaluateEpochRequest, *, timeout: float) -> Future[StepDecision]:
        """Ask, and return at once."""
        ...

    def take_epoch(self, question: EvaluateEpochRequest, decision: StepDecision) -> None:
        """Verify the answer, and have it carried out in the next step."""
        ...


class Session(Protocol):
    """The session of a run, as far as the trainer needs it. A TrainingSession is one."""

    halt: HaltSwitch
    global_step: int
    epoch: int
    apply_ms: float
    finalize_ms: float

    def begin_step(
        self,
        loss: Any,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Ask the mesh, as soon as the loss of a step is known."""
        ...

    def finish_step(self) -> list[CommandOutcome]:
        """End the step, after its optimizer."""
        ...

    def start_epoch(self, epoch: int) -> None:
        """Note that an epoch begins."""
        ...


class _BegunStep(NamedTuple):
    loss: float
    found: Mapping[str, float]
    """What was measured of it."""


class Trainer:
    """Ends the steps and epochs of your loop: metrics, emergencies, the guard, and the session.

    The parts are made by you, and work without it. While the run is halted, `step`, `hold` and every step of the
    optimizer stay where they are; nothing here raises because of the mesh, and only OutOfStep because of other ranks.
    """

    def __init__(
        self,
        *,
        session: Session,
        optimizer: torch.optim.Optimizer,
        emergencies: Emergencies,
        mode: ConservativeMode,
        metrics: StepMetrics | None = None,
        escalation: Escalation | None = None,
        guard: EpochGuard | None = None,
        checkpoints: CheckpointKeeper | None = None,
        controller: Controller | None = None,
        train_step: TrainStep | None = None,
        aggregator: GradientAggregator | None = None,
        seeds: Seeds | None = None,
        profiler: StepProfiler | None = None,
        learning_rates: Callable[[], Mapping[str, float]] = dict,
        leads_ranks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a `controller` nobody is asked at the end of an epoch.

        `train_step` is what `train` does, `aggregator` what `backward` puts gradients together with, `learning_rates`
        tells how whoever sets them stands. On the first of several ranks, which go back together, have `judge` called
        at the end of the session's step.
        """
        self.metrics = metrics or StepMetrics(optimizer=optimizer)
        self.guard = guard or EpochGuard(mode=mode)
        self._session = session
        self._emergencies = emergencies
        self._mode = mode
        self._escalation = escalation or Escalation(emergencies.config)
        self._checkpoints = checkpoints
        self._controller = controller
        self.train_step = train_step
        self.aggregator = aggregator or GradientAggregator()
        self._seeds = seeds
        self._learning_rates = learning_rates
        self._clock = clock
        self._epoch_began = clock()
        self.profiler = profiler
        """Traces the steps after a request, where there is one."""
        self._leads_ranks = leads_ranks
        self._begun: _BegunStep | None = None
        self._unjudged: _BegunStep | None = None
        self._postponed: Trigger | None = None
        self._gradient_norm: float | None = None
        """Of the step before, where it became known too late to be told with it."""
        self._accuracy: float | None = None
        self._last_loss = math.nan
        self._epoch_failed = False
        self._calm_epochs = 0
        self._told_at: int | None = None
        self._has_failed = False
        tell("optimizer_family", INFO, reason=type(optimizer).__name__.lower())
        # A step that began before the halt ends here, before it changes a parameter.
        optimizer.register_step_pre_hook(lambda *_: self._hold())

    @property
    def is_halted(self) -> bool:
        """Whether the run is to stand still."""
        return self._session.halt.check()

    def on_halt(self, callback: Callable[[bool, str], None]) -> Callable[[], None]:
        """Call a function with whether the run stands still, and why, at each change; returns how to stop."""
        return self._session.halt.listen(callback)

    def hold(self, timeout: float | None = None) -> bool:
        """Stay here while the run is halted; whether it may go on."""
        return self._session.halt.hold(timeout)

    def step(
        self,
        loss: Any,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> list[CommandOutcome]:
        """End a training step, after optimizer.step(): measure, ask the mesh, answer an emergency of the run itself."""
        self.hold()
        self.begin_step(loss, samples=samples, gradient_norm=gradient_norm, metrics=metrics)
        return self.finish_step()

    def begin_step(
        self,
        loss: Any,
        *,
        samples: int | None = None,
        gradient_norm: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Ask the mesh when the loss is known, so that it decides while backward and optimizer work.

        `finish_step` must follow, after optimizer.step(). Without a `gradient_norm` that of the step before is told.
        """
        if self._begun is not None:
            self.finish_step()
        self._hold_apart()
        value = read_loss(loss)
        norm = self._gradient_norm if gradient_norm is None else gradient_norm
        found = self._safely(lambda: self._measure(value, norm), {})
        self._session.begin_step(value, samples=samples, gradient_norm=norm, metrics={**found, **(metrics or {})})
        self._begun = _BegunStep(value, found)

    def finish_step(self, *, gradient_norm: float | None = None) -> list[CommandOutcome]:
        """End the step that was begun. The norm of its gradient, where it is given here, is told with the next one."""
        begun, self._begun, self._gradient_norm = self._begun, None, gradient_norm
        if begun is None:
            return []
        self._safely(self._show_seeds, None)
        self._unjudged = begun
        outcomes = self._session.finish_step()
        self.judge()
        if self.profiler is not None:
            self._safely(self.profiler.next_step, None)
        self._hold_apart()
        return outcomes

    def judge(self) -> None:
        """Look back on the step that ends, if nobody has, and on the epoch before it where that was put off."""
        begun, self._unjudged = self._unjudged, None
        postponed, self._postponed = self._postponed, None
        if begun is not None:
            self._safely(lambda: self._answer(postponed), None)
            self._safely(lambda: self._look_back(begun.loss, begun.found), None)

    def train(self, *batches: Any, samples: int | None = None) -> StepResult:
        """Train on batches by the `train_step`, and end the step; the mesh decides while backward and optimizer work.

        Raises:
            FailedPrecondition: When there is no `train_step`.
        """
        if self.train_step is None:
            raise FailedPrecondition("There is nothing to train by: give orchestrate a train_step.")
        return self.train_step.within(self, *batches, samples=samples)

    def backward(
        self, loss: Tensor, seeds: Mapping[str, SeedLoss], parameters: Sequence[Tensor], *, samples: int
    ) -> Aggregated:
        """Take the place of loss.backward() where seeds have losses of their own; see aggregation.losses.backward."""
        return aggregate(self.aggregator, loss, seeds, parameters, host_samples=samples)

    def end_epoch(self, *, failed: bool = False, accuracy: float | None = None) -> EpochReport[StepDecision]:
        """End an epoch within its budget, and begin the next one. `failed` adds to what the trainer saw itself.

        The controller is asked beside the training; what it commands in time is carried out in the next step.
        """
        self._hold_apart()
        has_failed = failed or self._epoch_failed
        report = self._close_epoch(accuracy, "failed" if has_failed else "")
        self._epoch_failed = False
        self._safely(self._time_epoch, None)
        if accuracy is not None:
            self._accuracy = accuracy
            self._safely(lambda: show({"tolaria.training.accuracy": accuracy}), None)
        self._safely(lambda: self._judge_epoch(has_failed, accuracy), None)
        self._session.start_epoch(self._session.epoch + 1)
        self._hold_apart()
        return report

    def _time_epoch(self) -> None:
        began, self._epoch_began = self._epoch_began, self._clock()
        EPOCH_DURATION.observe(self._epoch_began - began)

    def _close_epoch(self, accuracy: float | None, problem: str) -> EpochReport[StepDecision]:
        controller, epoch = self._controller, self._session.epoch
        if controller is None or not controller.is_connected:
            return self.guard.run(epoch, assemble=lambda: None, problem=problem)
        known = {} if accuracy is None else {"accuracy": accuracy}
        question: list[EvaluateEpochRequest] = []

        def assemble() -> EvaluateEpochRequest:
            question.append(controller.describe_epoch(self._last_loss, known))
            return question[0]

        return self.guard.run(
            epoch,
            assemble=assemble,
            ask=lambda asked: controller.ask_epoch(asked, timeout=self.guard.handshake_timeout_seconds),
            process=lambda decision: controller.take_epoch(question[0], decision),
            problem=problem,
        )

    def release(self, reason: str) -> None:
        """End an emergency from here, for example when its cause is gone."""
        self._emergencies.lower(NOTICE, reason)

    def _hold(self) -> None:
        self.hold()

    def _hold_apart(self) -> None:
        """Hold where no other rank waits in a collective of the loop's own, as in the backward of the next step."""
        if not self._leads_ranks:
            self.hold()

    def _measure(self, loss: float, gradient_norm: float | None) -> dict[str, float]:
        self.metrics.gradient_conflict_rate = self._conflict_rate()
        known = {} if self._accuracy is None else {"accuracy": self._accuracy}
        return known | self.metrics.collect(
            loss,
            gradient_norm=gradient_norm,
            apply_ms=self._session.apply_ms,
            finalize_ms=self._session.finalize_ms,
            enrich=not self._mode.is_active,
            read_devices=self._emergencies.level == ELEVATED,
        )

    def _conflict_rate(self) -> float | None:
        batches = self.train_step.batches if self.train_step is not None else None
        rates = [each.rate.metrics() for each in (self.aggregator, batches) if each is not None]
        return next((found["grad_conflict_rate"] for found in rates if found), self.metrics.gradient_conflict_rate)

    def _show_seeds(self) -> None:
        """Before the step ends, since the seeds' gradients go with it."""
        top = self.metrics.config.seed_layer_norms
        if self._seeds is None or self._session.global_step % self._mode.sample_every:
            return
        growing = self._seeds.growing()
        show({"tolaria.seeds.active": float(len(growing))})
        if top and not self._mode.is_active:
            show_points(as_points(layer_norms(growing, top=top)))

    def _look_back(self, loss: float, found: Mapping[str, float]) -> None:
        step, self._last_loss = self._session.global_step, loss
        self._epoch_failed |= not math.isfinite(loss)
        if not step % self._mode.sample_every:
            latency = {"tolaria.training.latency_ms": found["step_latency_ms"]} if "step_latency_ms" in found else {}
            show({"tolaria.training.loss": loss, **latency, **self._learning_rates()})
        self._tell_of_a_slow_host(step)
        self._answer(self._escalation.step(loss))

    def _judge_epoch(self, failed: bool, accuracy: float | None) -> None:
        trigger = self._escalation.epoch(failed=failed, accuracy=accuracy)
        if trigger is None and not failed:
            self._calm_down()
        if self._leads_ranks:
            # The others do not wait for it now.
            self._postponed = trigger
        else:
            self._answer(trigger)

    def _tell_of_a_slow_host(self, step: int) -> None:
        spent, budget = self._session.apply_ms, self.metrics.config.kasmina_budget_ms
        is_due = self._told_at is None or step - self._told_at >= STEPS_BETWEEN_EVENTS
        if spent <= budget or not is_due:
            return
        self._told_at = step
        tell(
            "tolaria.kasmina_timeout", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason="apply_latency", step_index=step,
            budget_ms=budget, spent_ms=round(spent, 3),
        )  # fmt: skip

    def _answer(self, trigger: Trigger | None) -> None:
        """Raise the level, return to a checkpoint where that is called for, and go on from what came of it."""
        while trigger is not None:
            self._calm_epochs = 0
            self._emergencies.alarm(trigger.level, trigger.reason)
            keeper = self._checkpoints
            trigger = self._roll_back(keeper, trigger) if trigger.rollback and keeper is not None else None

    def _roll_back(self, keeper: CheckpointKeeper, trigger: Trigger) -> Trigger | None:
        if (instead := self._escalation.may_roll_back()) is not None:
            return instead
        self._epoch_failed = True
        try:
            done = keeper.rollback("", trigger.rollback, trigger.reason)
        except NotFound:
            log.warning("rollback_impossible", reason=trigger.reason, problem="there is no checkpoint yet")
            return None
        except EsperError as error:
            log.error("rollback_failed", reason=trigger.reason, problem=error.message)
            return self._escalation.rollback_failed(trigger.rollback)
        return self._escalation.rolled_back(done.tier, is_late=done.is_late)

    def _calm_down(self) -> None:
        """After enough good epochs take back what this trainer raised by itself; a halt never."""
        self._calm_epochs += 1
        found = self._emergencies.in_force
        is_ours = found is not None and found[0].origin == SOURCE and NOTICE < found[0].level < HALT
        if is_ours and self._calm_epochs >= self._emergencies.config.calm_epochs:
            self._emergencies.lower(NOTICE, CALM)

    def _safely(self, work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except OutOfStep:
            raise
        except Exception as error:  # The trainer's loop never sees a mesh exception.
            if not self._has_failed:
                log.error("trainer_step_failed", exc_info=error)
            self._has_failed = True
            return otherwise
