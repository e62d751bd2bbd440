from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_rpc.errors import FailedPrecondition
from esper_servers.tolaria.aggregation.aggregator import Aggregated, GradientAggregator
from esper_servers.tolaria.aggregation.losses import backward
from esper_servers.tolaria.aggregation.weights import SeedLoss
from esper_servers.tolaria.profiling import StepProfiler
from esper_servers.tolaria.step_metrics import StepMetrics
from esper_servers.tolaria.train_step import StepResult, TrainStep

from .detached import DetachedSession


class DetachedTrainer:
    """What `orchestrate` gives a loop without a mesh: it trains, aggregates and traces alike, and nobody is told."""

    is_halted = False

    def __init__(
        self,
        session: DetachedSession,
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

    def hold(self, timeout: float | None = None) -> bool:
        """Go on at once: nobody halts it."""
        return True

    def on_halt(self, callback: Callable[[bool, str], None]) -> Callable[[], None]:
        """Do nothing; the function is never called."""
        return lambda: None

    def release(self, reason: str) -> None:
        """Do nothing."""

    def step(self, *_: Any, **__: Any) -> list[Any]:
        """Let schedules go on."""
        return self.finish_step()

    def begin_step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def finish_step(self, *, gradient_norm: float | None = None) -> list[Any]:
        """Let schedules go on."""
        outcomes = self._session.finish_step()
        self.profiler.next_step()
        return outcomes

    def end_epoch(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

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
