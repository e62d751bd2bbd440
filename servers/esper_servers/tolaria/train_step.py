from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import structlog
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError

log = structlog.get_logger(__name__)

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


class TrainStep:
    """Forward, backward and optimizer of one step, of one batch or of several that are accumulated.

    A gradient that is not finite changes nothing: the optimizer is not stepped. Make it after `attach`, since a model
    is compiled with its sites inside.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_of: LossOf, *, config: TrainStepConfig | None = None
    ) -> None:
        self.config = config or TrainStepConfig()
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
        return self._update(total / len(batches))

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
                log.warning("compile_fallback", event_type="tolaria.compile_fallback", error=str(error)[:500])
                return loss

    def _update(self, loss: float) -> StepResult:
        self.scaler.unscale_(self._optimizer)
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.max_gradient_norm))
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
