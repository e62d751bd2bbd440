from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch

from esper_rpc.config import Range, validate

from .device_metrics import DeviceMetrics
from .trends import Trend

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class TolariaConfig:
    """What the trainer measures."""

    step_enrichment_enabled: bool = True
    """Whether a step tells more than loss, norm of the gradient, throughput and latency."""
    device_sample_seconds: Annotated[float, Range(0, 3600)] = 1.0
    """How often the use of processors and devices is read."""
    kasmina_budget_ms: Annotated[float, Range(0.1, 60_000)] = 5.0
    """A step in which the seed host took longer is told."""
    seed_layer_norms: Annotated[int, Range(0, 16)] = 0
    """Of so many layers of each seed, those with the largest, the norm of the gradient is shown."""

    def __post_init__(self) -> None:
        validate(self)


class StepMetrics:
    """Collects what a step tells beside its loss, under the names of SystemStatePacket.training_metrics.

    What is not known is left out, and nothing here waits for a device. For the training thread.
    """

    def __init__(
        self,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        config: TolariaConfig | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config or TolariaConfig()
        self._optimizer = optimizer
        self._clock = clock
        self._devices = DeviceMetrics(self.config.device_sample_seconds)
        self._loss = Trend()
        self._gradient = Trend()
        self._input_wait: float | None = None
        self._step_ended: float | None = None
        self._copies: list[tuple[Any, Any]] = []
        """Events of CUDA: before and after."""
        self.gradient_conflict_rate: float | None = None
        """Set by whoever aggregates gradients: the share of seeds whose gradient is against the host's."""

    def collect(
        self,
        loss: float,
        *,
        gradient_norm: float | None = None,
        apply_ms: float | None = None,
        finalize_ms: float | None = None,
        enrich: bool = True,
        read_devices: bool = False,
    ) -> dict[str, float]:
        """Return the metrics of the step that ends; nothing where they are switched off or `enrich` is not wanted.

        The trends follow every step. `read_devices` reads the devices in this step whatever the interval.
        """
        self._loss.add(loss)
        if gradient_norm is not None:
            self._gradient.add(gradient_norm)
        found = self._times(apply_ms, finalize_ms)
        if not (enrich and self.config.step_enrichment_enabled):
            return {}
        found |= self._trends() | self._settings() | self._devices.read(now=read_devices)
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of a loader, and measure how long each was waited for."""
        iterator = iter(loader)
        while True:
            begun = self._clock()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._input_wait = self._clock() - begun
            yield batch

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Measure copies to the device in a block; without CUDA it does nothing."""
        if not torch.cuda.is_available():
            yield
            return
        make: Any = torch.cuda.Event  # It has no types.
        begun, ended = make(enable_timing=True), make(enable_timing=True)
        begun.record()
        yield
        ended.record()
        self._copies.append((begun, ended))

    def _times(self, apply_ms: float | None, finalize_ms: float | None) -> dict[str, float | None]:
        now, before, wait = self._clock(), self._step_ended, self._input_wait
        self._step_ended, self._input_wait = now, None
        return {
            "step_latency_ms": None if before is None else (now - before) * 1e3,
            "input_wait_ms": None if wait is None else wait * 1e3,
            "h2d_copy_ms": self._copy_ms(),
            "kasmina.apply_ms": apply_ms,
            "kasmina.finalize_ms": finalize_ms,
        }

    def _copy_ms(self) -> float | None:
        """Of the copies that are done: asking after one that is not would wait for the device."""
        done = [pair for pair in self._copies if pair[1].query()]
        self._copies = [pair for pair in self._copies if pair not in done][-16:]
        return sum(begun.elapsed_time(ended) for begun, ended in done) if done else None

    def _trends(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {"grad_conflict_rate": self.gradient_conflict_rate}
        if self._loss.count:
            found |= {
                "loss_delta": self._loss.delta,
                "loss_ewma": self._loss.mean,
                "loss_volatility": self._loss.deviation,
            }
        if self._gradient.count:
            found |= {"grad_norm_ewma": self._gradient.mean, "grad_var": self._gradient.variance}
        return found

    def _settings(self) -> dict[str, float | None]:
        if self._optimizer is None or not self._optimizer.param_groups:
            return {}
        group = self._optimizer.param_groups[0]
        return {"optimizer_lr": float(group["lr"]), "optimizer_momentum": _momentum(group)}


def _momentum(group: dict[str, Any]) -> float | None:
    """Of SGD its momentum, of Adam and its kin the first of the betas."""
    if "momentum" in group:
        return float(group["momentum"])
    return float(group["betas"][0]) if "betas" in group else None
