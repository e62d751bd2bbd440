from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import TelemetryLevel

from .aggregation.batches import BatchAggregator
from .telemetry import show, tell

PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip

LossOf = Callable[[nn.Module, Any], Tensor]
"""Runs the model on a batch and returns the mean loss of its samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStepConfig:
    """How a training step is computed."""

    precision: str = "float32"
    """Of the forward pass under autocast: float32, bfloat16 or float16; weights stay as they are."""
    compile: bool = False
    """Compile the model. What cannot be compiled runs eagerly, and is told once."""
    tf32: bool = True
    """Let CUDA devices multiply in TensorFloat-32."""
    max_gradient_norm: Annotated[float, Range(1e-6, 1e9)] = 10.0

    def __post_init__(self) -> None:
        validate(self)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}.")


class StepResult(NamedTuple):
    """What a training step came to."""

    loss: float
    """The mean of its batches."""
    gradient_norm: float
    """Before it was clipped; not finite when there was no update."""
    has_updated: bool


class Loop(Protocol):
    """Whoever ends the steps of a training. A Trainer is one."""

    def begin_step(self, loss: Any, *, samples: int | None = None) -> object:
        """Begin the end of a step, when its loss is known."""
        ...

    def finish_step(self, *, gradient_norm: float | None = None) -> object:
        """End it, after the optimizer."""
        ...


class TrainStep:
    """Forward, backward and optimizer of one step, of one batch or of several that are accumulated.

    A gradient that is not finite changes nothing: the optimizer is not stepped. Make it after `attach`, since a model
    is compiled with its sites inside.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_of: LossOf,
        *,
        config: TrainStepConfig | None = None,
        batches: BatchAggregator | None = None,
    ) -> None:
        """With `batches` the gradients of several batches are put together by it, conflicts and all.

        Raises:
            ConfigError: With `batches` in float16, whose gradients are scaled: a limit to their norm means nothing.
        """
        self.config = config or TrainStepConfig()
        if batches is not None and self.config.precision == "float16":
            raise ConfigError("Batches are not aggregated in float16; choose bfloat16 or float32.")
        self.batches = batches
        self._model = model
        self._optimizer = optimizer
        self._loss_of = loss_of
        self._device = next((each.device for each in model.parameters()), torch.device("cpu"))
        # bfloat16 has the exponents of float32 and needs no scale.
        is_scaled = self.config.precision == "float16"
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=is_scaled)
        self._compiled = torch.compile(model) if self.config.compile else None
        if self.config.tf32 and self._device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        show({"tolaria.train.amp_enabled": float(self.config.precision != "float32")})
        if self.is_compiled:
            tell("tolaria.compile_enabled", TelemetryLevel.TELEMETRY_LEVEL_INFO, reason="asked_for")

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs compiled."""
        return self._compiled is not None

    def __call__(self, *batches: Any, on_loss: Callable[[float], object] | None = None) -> StepResult:
        """Train on batches, which count alike; returns when the optimizer has stepped.

        `on_loss` gets the loss before the last backward pass, so that the mesh can be asked meanwhile. What the loss
        function raises is the caller's.
        """
        if not batches:
            raise ValueError("There is no batch to train on.")
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, batch in enumerate(batches, 1):
            loss = self._forward(_to_device(batch, self._device))
            total += float(loss.detach())
            if index == len(batches) and on_loss is not None:
                on_loss(total / len(batches))
            self.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            if self.batches is not None:
                self._hand_over(self.batches, len(batches))
        if self.batches is not None:
            self._take_back(self.batches)
        return self._update(total / len(batches))

    def within(self, loop: Loop, *batches: Any, samples: int | None = None) -> StepResult:
        """Train on batches in a step of a loop: it is begun when the loss is known, and finished after the update."""
        result = self(*batches, on_loss=lambda loss: loop.begin_step(loss, samples=samples))
        loop.finish_step(gradient_norm=result.gradient_norm)
        return result

    def _hand_over(self, batches: BatchAggregator, count: int) -> None:
        """Give the gradients of a batch to the aggregator. Those of seeds stay: nobody else reaches their weights."""
        parameters = self._parameters()
        gradients = [each.grad for each in parameters]
        # Its loss was divided by the count, so that seeds get a mean.
        torch._foreach_mul_([each for each in gradients if each is not None], float(count))
        batches.add(gradients, samples=1)
        for each in parameters:
            each.grad = None

    def _take_back(self, batches: BatchAggregator) -> None:
        for parameter, gradient in zip(self._parameters(), batches.finish().gradients, strict=True):
            parameter.grad = gradient

    def _parameters(self) -> list[Tensor]:
        return [each for group in self._optimizer.param_groups for each in group["params"]]

    def _forward(self, batch: Any) -> Tensor:
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32):
            if self._compiled is None:
                return self._loss_of(self._model, batch)
            try:
                return self._loss_of(self._compiled, batch)  # type: ignore[arg-type]  # torch.compile returns a module.
            except Exception as error:  # noqa: BLE001  # If it was the user's own, the eager model raises it again.
                loss = self._loss_of(self._model, batch)
                self._compiled = None
                tell(
                    "tolaria.compile_fallback", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=type(error).__name__,
                    error=str(error)[:500],
                )  # fmt: skip
                return loss

    def _update(self, loss: float) -> StepResult:
        self.scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._parameters(), self.config.max_gradient_norm))
        if not math.isfinite(norm):
            # Not the optimizer's: one NaN in a gradient would stay in its momentum for ever.
            self._optimizer.zero_grad(set_to_none=True)
            if self.scaler.is_enabled():
                self.scaler.update()
            return StepResult(loss, norm, has_updated=False)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return StepResult(loss, norm, has_updated=True)


def _to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in a batch, without waiting where the memory is pinned."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _to_device(each, device) for name, each in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(each, device) for each in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(_to_device(each, device) for each in batch)  # type: ignore[call-arg]  # A list or tuple.
    return batch
