from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_client.follower_session import FollowerSession
from esper_rpc.errors import FailedPrecondition
from esper_servers.tolaria.aggregation.aggregator import Aggregated, GradientAggregator
from esper_servers.tolaria.aggregation.losses import backward
from esper_servers.tolaria.aggregation.weights import SeedLoss
from esper_servers.tolaria.metrics.profiling import StepProfiler
from esper_servers.tolaria.metrics.step_metrics import StepMetrics
from esper_servers.tolaria.train_step import StepResult, TrainStep

from .detached import DetachedSession


class QuietTrainer:
    """What `orchestrate` gives a loop that asks nobody: without a mesh, and on every rank but the first.

    It trains, aggregates and traces alike; what a step came to is not told.
    """

    def __init__(
        self,
        session: DetachedSession | FollowerSession,
        optimizer: torch.optim.Optimizer,
        *,
        profiler: StepProfiler,
        train_step: TrainStep | None = None,
        aggregator: GradientAggregator | None = None,
    ) -> None:
        self.metrics = StepMetrics(optimizer=optimizer)
        self.profiler = profiler
        self.train_step = train_step
        self.aggregator = aggregator or GradientAggregator()
        self._session = session
        if isinstance(session, FollowerSession):
            optimizer.register_step_pre_hook(lambda *_: self._hold())

    @property
    def is_halted(self) -> bool:
        """Whether the first rank halted this one, which it does where they share memory."""
        return self._session.halted

    def hold(self, timeout: float | None = None) -> bool:
        """Stay here while this rank is halted; whether it may go on."""
        return self._session.hold(timeout)

    def on_halt(self, callback: Callable[[bool, str], None]) -> Callable[[], None]:
        """Call a function with whether this rank stands still, and why, at each change; returns how to stop."""
        return self._session.halt.listen(callback)

    def release(self, reason: str) -> None:
        """Do nothing."""

    def step(self, loss: Any, **what: Any) -> list[Any]:
        """End a training step."""
        self._hold()
        self.begin_step(loss, **what)
        return self.finish_step()

    def begin_step(self, loss: Any, **what: Any) -> None:
        """Begin the end of a step."""
        self._session.begin_step(loss, **what)

    def finish_step(self, *, gradient_norm: float | None = None) -> list[Any]:
        """End it, after the optimizer."""
        outcomes = self._session.finish_step()
        self.profiler.next_step()
        return outcomes

    def judge(self) -> None:
        """Do nothing: without a mesh, and on other ranks than the first, nobody looks back on a step."""

    def end_epoch(self, *, failed: bool = False, accuracy: float | None = None) -> None:
        """Begin the next epoch; how this one was is judged by the first rank."""
        self._session.start_epoch(self._session.epoch + 1)

    def train(self, *batches: Any, samples: int | None = None) -> StepResult:
        """Train on batches by the `train_step`; raises FailedPrecondition when there is none."""
        if self.train_step is None:
            raise FailedPrecondition("There is nothing to train by: give orchestrate a train_step.")
        return self.train_step.within(self, *batches, samples=samples)

    def backward(
        self, loss: Tensor, seeds: Mapping[str, SeedLoss], parameters: Sequence[Tensor], *, samples: int
    ) -> Aggregated:
        """Take the place of loss.backward() where seeds have losses of their own."""
        return backward(self.aggregator, loss, seeds, parameters, host_samples=samples)

    def _hold(self) -> None:
        self.hold()
