"""The mesh under a Hugging Face Trainer: `Trainer(callbacks=[MeshCallback()])`. Needs the extra `huggingface`."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from esper_client.attach import attach
from esper_rpc.errors import ConfigError, EsperError

from .measuring import gradient_norm
from .step_loss import StepLoss

try:
    from accelerate.utils import load, save
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ConfigError(f"{error.name} is missing; install it with: pip install 'esper-rpc[huggingface]'") from error

SESSION_FILE = "esper_session.bin"
STATE_FILE = "trainer_state.json"


class MeshCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not read transformers.
    """Lets the mesh steer a training. Each checkpoint holds the seeds; a resumed training goes on bit for bit.

    The loss of a step is what the model returns as its loss. Where that is computed outside of the model the mesh is
    told the last one that was logged. A Trainer tells its callbacks of no exception: in a `with` block the session is
    closed there too, otherwise when the callback or the process goes. `resume_from` names the checkpoint when it is
    not below `output_dir`; `options` are those of esper_client.attach.
    """

    def __init__(self, *, resume_from: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self.session: Any = None
        """The TrainingSession of the training; `session.export()` works after it too."""
        self._resume_from = resume_from
        self._options = options
        self._model: Any = None
        self._hook: Any = None
        self._loss = StepLoss()
        self._is_share = False
        self._gradient_norm: Any = None
        self._logged: float | None = None
        self._has_warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session. The model stays as it is."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.session is not None:
            self.session.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach: the first event after the optimizer was made. A retry with a smaller batch goes on as it is."""
        if self._model is kwargs["model"] and self._hook is not None:
            return
        _refuse_split_models(args)
        self._model = kwargs["model"]
        self.session = attach(self._model, _own_optimizer(kwargs["optimizer"]), **self._options)
        weakref.finalize(self, self.session.close)
        if state.global_step > 0:
            self._restore(self._checkpoint(args, state))
        self._hook = self._model.register_forward_hook(self._on_forward, with_kwargs=True)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell which epoch begins."""
        self.session.start_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the gradient that the optimizer will use: where `max_grad_norm` clips it, it has been clipped."""
        if self._hook is not None:
            self._gradient_norm = gradient_norm(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Step: the optimizer has stepped, and a checkpoint of this step is still to come."""
        loss = self._step_loss(args)
        norm, self._gradient_norm = self._gradient_norm, None
        if loss is not None:
            self.session.step(
                loss,
                samples=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                gradient_norm=None if norm is None else float(norm),
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the logged loss."""
        self._logged = (logs or {}).get("loss", self._logged)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the session to the checkpoint that was just written."""
        if not args.should_save:
            return
        file = _checkpoint_of(args, state.global_step) / SESSION_FILE
        if file.parent.is_dir():
            partial = file.with_suffix(".partial")
            save(self.session.state_dict(), partial, safe_serialization=False)
            partial.replace(file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close. Where the Trainer has loaded its best model, the seeds are those of that checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            try:
                self._restore(Path(state.best_model_checkpoint))
            except EsperError as error:
                warnings.warn(f"The seeds are those of the last step, not of the best model: {error}", stacklevel=2)
        self.close()

    def _restore(self, checkpoint: Path) -> None:
        file = checkpoint / SESSION_FILE
        if file.exists():
            self.session.load_state_dict(load(file, map_location="cpu"))
        else:
            warnings.warn(f"{checkpoint} holds no session of the mesh: no seed is restored.", stacklevel=2)

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the checkpoint that this training goes on from: the Trainer tells its callbacks no path."""
        wanted = [self._resume_from, args.resume_from_checkpoint, _checkpoint_of(args, state.global_step)]
        for each in wanted:
            if isinstance(each, (str, os.PathLike)) and _is_of(Path(each), state):
                return Path(each)
        raise ConfigError(f"Which checkpoint of step {state.global_step} is this? Say MeshCallback(resume_from=...).")

    def _on_forward(self, model: Any, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if model.training and loss is not None and loss.requires_grad:
            self._loss.add(loss)
            # Then it is the micro-batch's share in a mean over the whole step.
            self._is_share = kwargs.get("num_items_in_batch") is not None

    def _step_loss(self, args: TrainingArguments) -> Any:
        if not self._is_share:
            loss = self._loss.take_mean()
        elif (loss := self._loss.take_sum()) is not None and args.average_tokens_across_devices:
            # The items were counted on all devices.
            loss = loss * args.world_size
        if loss is None and not self._has_warned:
            self._has_warned = True
            warnings.warn("The model returns no loss: the mesh gets the one that is logged.", stacklevel=2)
        return self._logged if loss is None else loss


def _refuse_split_models(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ConfigError("nn.DataParallel copies the model in each step; use one device, or DDP under torchrun.")
    if args.deepspeed or args.fsdp:
        raise ConfigError("DeepSpeed and FSDP split the model; use one device, or DDP under torchrun.")


def _own_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside of what Accelerate makes of it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    # The Trainer restores the optimizer before any event. Marked as scheduled it gets no new group by a kept seed.
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def _checkpoint_of(args: TrainingArguments, global_step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{global_step}"


def _is_of(checkpoint: Path, state: TrainerState) -> bool:
    """Whether a folder is the checkpoint that a state was read from: two runs hardly log the same figures."""
    file = checkpoint / STATE_FILE
    if not file.exists():
        return False
    found = TrainerState.load_from_json(str(file))
    # As text: a loss that is not a number is unequal to itself.
    return repr((found.global_step, found.log_history)) == repr((state.global_step, state.log_history))
