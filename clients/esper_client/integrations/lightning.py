"""The mesh under a Lightning Trainer: `Trainer(callbacks=[MeshCallback()])`. Needs the extra `lightning`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from esper_client.attach import attach
from esper_rpc.errors import ConfigError

from .measuring import gradient_norm, samples_in
from .step_loss import StepLoss

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise ConfigError(f"{error.name} is missing; install it with: pip install 'esper-rpc[lightning]'") from error


class MeshCallback(Callback):  # type: ignore[misc]  # mypy does not read Lightning.
    """Lets the mesh steer a fit. Its checkpoints hold the seeds; with `ckpt_path=` the fit goes on bit for bit.

    `options` are those of esper_client.attach. Of several optimizers the one at `optimizer_index` is the mesh's.
    """

    def __init__(self, *, optimizer_index: int = 0, **options: Any) -> None:
        self.session: Any = None
        """The TrainingSession of the last fit; `session.export()` works after it too."""
        self._optimizer_index = optimizer_index
        self._options = options
        self._saved: dict[str, Any] | None = None
        self._loss = StepLoss()
        self._optimizer_steps = 0
        self._samples: int | None = 0
        self._gradient_norm: Any = None
        self._has_warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hook after the optimizers were made, and the last before their state is restored.
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigError(f"{type(trainer.strategy).__name__} splits the model; use one device or DDP.")
        if self._optimizer_index >= len(trainer.optimizers):
            raise ConfigError(
                f"There is no optimizer {self._optimizer_index}; the model has {len(trainer.optimizers)}."
            )
        self.session = attach(pl_module, trainer.optimizers[self._optimizer_index], **self._options)
        if self._saved is not None:
            self.session.load_state_dict(self._saved)
            self._saved = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._optimizer_steps = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session.start_epoch(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # Unscaled, and not clipped yet.
        if getattr(optimizer, "optimizer", optimizer) is trainer.optimizers[self._optimizer_index]:
            self._gradient_norm = gradient_norm(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Lightning divides it where it accumulates gradients by itself.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._loss.add(loss.detach() * scale)
        samples = samples_in(batch)
        self._samples = None if samples is None or self._samples is None else self._samples + samples
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self._step(self._loss.take_mean(), trainer.world_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close()

    def state_dict(self) -> dict[str, Any]:
        return self.session.state_dict() if self.session is not None else self._saved or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.session is not None:
            self.session.load_state_dict(state_dict)
        else:
            # Of a fit that begins: the sites come with its session.
            self._saved = state_dict or None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_missing_seeds()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_missing_seeds()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_missing_seeds()

    def _step(self, loss: Any, world_size: int) -> None:
        samples, self._samples = self._samples, 0
        norm, self._gradient_norm = self._gradient_norm, None
        if loss is not None:
            self.session.step(
                loss,
                samples=None if samples is None else samples * world_size,
                gradient_norm=None if norm is None else float(norm),
            )
        elif not self._has_warned:
            self._has_warned = True
            warnings.warn("training_step returns no loss: the mesh is not asked.", stacklevel=2)

    def _warn_of_missing_seeds(self) -> None:
        if self._saved is not None:
            warnings.warn("This model lacks the seeds of its checkpoint: only a fit restores them.", stacklevel=2)

    def _close(self) -> None:
        if self.session is not None:
            self.session.close()
