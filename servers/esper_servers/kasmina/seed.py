from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from esper_rpc.config import Range, validate
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedState

from . import lifecycle
from .alpha import AlphaSchedule
from .site import Branch, Site

ATTACHED: Final = frozenset({*lifecycle.GROWING, lifecycle.FOSSILIZED})


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedConfig:
    """How a seed trains until it is fossilised."""

    learning_rate: Annotated[float, Range(1e-8, 1.0)] = 1e-3
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    clip_norm: Annotated[float, Range(1e-6, 1e6)] = 1.0
    blending_steps: Annotated[int, Range(1, 1_000_000)] = 20
    violations: Annotated[int, Range(1, 1000)] = 3
    """Non-finite gradients in a row after which a seed is culled; a gradient scaler makes single ones."""
    embargo_seconds: Annotated[float, Range(0, 86_400)] = 2.0

    def __post_init__(self) -> None:
        validate(self)


class SeedSlot:
    """One seed at one site: its stage, module, optimizer and counters. Touched at the safe point only."""

    def __init__(self, seed_id: str, site: Site, *, layer_depth: int, config: SeedConfig) -> None:
        self.seed_id = seed_id
        self.site = site
        self.layer_depth = layer_depth
        self.config = config
        self.branch: Branch = site.branch
        self.germinated_epoch = 0
        self._clear()

    def _clear(self) -> None:
        self.blueprint_id = ""
        self.manifest = b""
        """The serialised KernelManifest that the module was built from."""
        self.risk = 0.0
        self.optimizer: Optimizer | None = None
        self.schedule = AlphaSchedule(total_steps=self.config.blending_steps)
        self.alpha_steps = 0
        self.steps_in_stage = 0
        self.updates = 0
        """Optimizer steps taken since germination."""
        self.violations = 0
        self.gradient_norm: float | None = None
        self.loss_at_graft: float | None = None
        self.is_fine_tuning = False
        self.paused_until: float | None = None
        self.embargo_until = 0.0

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.branch.stage

    @property
    def parameter_count(self) -> int:
        """Parameters that this seed adds to the model."""
        return sum(p.numel() for p in self.branch.module.parameters()) if self.branch.module is not None else 0

    @property
    def trains(self) -> bool:
        """Whether Kasmina updates it in this stage; after a hold began it does not."""
        active = self.stage in (lifecycle.TRAINING, lifecycle.BLENDING) or self.is_fine_tuning
        return active and not self.branch.paused and self.optimizer is not None

    def enter(self, stage: Stage) -> None:
        """Move to a stage. Whether it may is the caller's question."""
        self.branch.stage = stage
        self.steps_in_stage = 0
        self.is_fine_tuning = False
        if stage == lifecycle.CULLED:
            self.drop_module()
        elif stage == lifecycle.RESETTING:
            self._clear()
        elif stage == lifecycle.FOSSILIZED:
            self.branch.alpha, self.optimizer = 1.0, None

    def attach(self, module: nn.Module) -> None:
        """Take a module and make its optimizer."""
        module.train(self.site.training)
        self.branch.module, self.branch.alpha, self.branch.saw_non_finite = module, 0.0, None
        self.optimizer = self._new_optimizer(module)

    def drop_module(self) -> None:
        """Give the site back to its host."""
        self.branch.module, self.branch.alpha, self.branch.saw_non_finite = None, 0.0, None
        self.branch.paused, self.paused_until, self.optimizer = False, None, None

    def output_was_non_finite(self) -> bool:
        """Whether the seed gave something that is not a number since it was blended in."""
        return self.branch.saw_non_finite is not None and bool(self.branch.saw_non_finite)

    def advance_alpha(self) -> float:
        """Go one step along the schedule and return the new alpha."""
        self.alpha_steps = min(self.alpha_steps + 1, self.schedule.total_steps)
        self.branch.alpha = self.schedule.alpha(self.alpha_steps)
        return self.branch.alpha

    def step_optimizer(self) -> bool:
        """Use this step's gradients; False once the seed has failed."""
        module, optimizer = self.branch.module, self.optimizer
        if module is None or optimizer is None or not self.trains:
            self.clear_gradients()
            return True
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            norm = nn.utils.clip_grad_norm_(module.parameters(), self.config.clip_norm)
            self.gradient_norm = float(norm)
            self._update(optimizer)
        self.clear_gradients()
        return self.violations < self.config.violations

    def clear_gradients(self) -> None:
        """Forget gradients, as the user's zero_grad cannot see them."""
        if self.branch.module is not None:
            self.branch.module.zero_grad(set_to_none=True)

    def _update(self, optimizer: Optimizer) -> None:
        if self.gradient_norm is None or not math.isfinite(self.gradient_norm):
            self.violations += 1
            return
        self.violations = 0
        self.updates += 1
        optimizer.step()

    def _new_optimizer(self, module: nn.Module) -> Optimizer | None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            return None
        return AdamW(parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)

    def export(self, epoch: int) -> SeedState:
        """Return its state as the contract has it."""
        state = SeedState(seed_id=self.seed_id, stage=self.stage, layer_depth=self.layer_depth, metrics=self._metrics())
        if self.stage in ATTACHED:
            state.age_epochs = max(0, epoch - self.germinated_epoch)
            state.risk_score = 1.0 if self.violations else self.risk
            if self.optimizer is not None:
                state.learning_rate = self.config.learning_rate
            if self.gradient_norm is not None:
                state.gradient_norm = self.gradient_norm
        return state

    def _metrics(self) -> dict[str, float]:
        metrics = {"alpha": self.branch.alpha, "steps_in_stage": float(self.steps_in_stage)}
        if self.stage not in ATTACHED:
            return metrics
        metrics |= {
            "alpha_steps": float(self.alpha_steps),
            "alpha_total_steps": float(self.schedule.total_steps),
            "alpha_temperature": self.schedule.temperature,
            "blend_allowed": float(self.stage == lifecycle.TRAINING and self.updates > 0),
            "risk_tolerance": 1.0 - self.risk,
            "kernel_attached": float(self.branch.module is not None),
            "paused": float(self.branch.paused),
        }
        if self.loss_at_graft is not None:
            metrics["loss_at_graft"] = self.loss_at_graft
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only, so that torch.load(weights_only=True) reads it."""
        module, optimizer = self.branch.module, self.optimizer
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {
            **counters,
            "stage": int(self.stage),
            "alpha": self.branch.alpha,
            "schedule": {name: getattr(self.schedule, name) for name in _SCHEDULE},
            "feature_shape": list(self.site.output_shape),
            "dtype": str(self.site.output_dtype).removeprefix("torch."),
            "module": None if module is None else module.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], module: nn.Module | None) -> None:
        """Restore, with the module built anew by the caller."""
        self.drop_module()
        self._clear()
        if module is not None:
            module.load_state_dict(state["module"])
            self.attach(module)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.branch.stage = Stage.Name(state["stage"]) and state["stage"]
        self.branch.alpha = state["alpha"]
        self.schedule = AlphaSchedule(**state["schedule"])
        if state["optimizer"] is None:
            self.optimizer = None
        elif self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


_SCHEDULE: Final = ("method", "total_steps", "temperature", "start", "end")
_COUNTERS: Final = (
    "blueprint_id", "manifest", "risk", "alpha_steps", "steps_in_stage", "updates", "violations", "gradient_norm",
    "loss_at_graft", "is_fine_tuning", "germinated_epoch",
)  # fmt: skip


def saved_dtype(state: dict[str, Any]) -> torch.dtype:
    """The element type that a saved seed was built for."""
    dtype = getattr(torch, state["dtype"], torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
