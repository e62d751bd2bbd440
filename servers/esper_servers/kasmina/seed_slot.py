from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage, SeedState
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.blueprints.kernel import dtype_name

from . import lifecycle
from .alpha import SCHEDULES, AlphaSchedule
from .site import Site

SEED_LEARNING_RATE = 1e-3


class IllegalMove(Exception):
    """A stage cannot follow the present one."""


@dataclass
class SeedSlot:
    """One seed: where it lives, its stage, its optimizer and its alpha."""

    seed_id: str
    site_id: str
    site: Site
    depth: int
    blueprint_id: str = ""
    extras_digest: bytes = b""
    steps_in_stage: int = 0
    age_epochs: int = 0
    schedule: AlphaSchedule = field(default_factory=AlphaSchedule)
    optimizer: torch.optim.Optimizer | None = None
    gradient_norm: float | None = None
    loss_at_graft: float | None = None
    embargo_left: int = 0
    paused_until: float = 0.0

    @property
    def stage(self) -> SeedLifecycleStage.ValueType:
        """The stage, which lives with the site because the forward pass depends on it."""
        return self.site.stage

    def move(self, stage: SeedLifecycleStage.ValueType) -> None:
        """Change the stage; raises IllegalMove."""
        if not lifecycle.is_legal(self.stage, stage):
            raise IllegalMove(f"{self.seed_id} cannot move from stage {self.stage} to {stage}")
        self.site.stage = stage
        self.steps_in_stage = 0

    def plant(self, module: nn.Module, blueprint_id: str, extras_digest: bytes) -> None:
        """Put a module into the site, with an optimizer of its own."""
        self.site.hold(module)
        self.site.alpha.zero_()
        self.blueprint_id, self.extras_digest = blueprint_id, extras_digest
        self.schedule, self.loss_at_graft = AlphaSchedule(), None
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=SEED_LEARNING_RATE)

    def uproot(self) -> None:
        """Take the module out; the site is the host alone again."""
        self.site.hold(None)
        self.site.alpha.zero_()
        self.optimizer, self.gradient_norm, self.blueprint_id, self.extras_digest = None, None, "", b""

    def advance_alpha(self) -> float:
        """Move alpha one step on."""
        value = self.schedule.advance()
        self.site.alpha.fill_(value)
        return value

    def step_optimizer(self) -> None:
        """Step the seed's own optimizer; gradients that are not finite are dropped."""
        module = self.site.seed
        if self.optimizer is None or module is None:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            norm = float(nn.utils.clip_grad_norm_(module.parameters(), 1.0))
            self.gradient_norm = norm
            if math.isfinite(norm):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def run_site(self) -> RunSite:
        """Describe the site for OpenRun."""
        return RunSite(
            site_id=self.site_id,
            module_kind=type(self.site.host).__name__,
            input_shape=self.site.input_shape,
            output_shape=self.site.output_shape,
            dtype=dtype_name(self.site.dtype),
        )

    def run_seed(self) -> RunSeed:
        """Describe the seed for OpenRun."""
        return RunSeed(
            seed_id=self.seed_id,
            site_id=self.site_id,
            stage=self.stage,
            blueprint_id=self.blueprint_id,
            extras_digest=self.extras_digest,
            alpha=self.schedule.value() if self.stage in lifecycle.BLENDED else 0.0,
        )

    def state(self, loss_now: float) -> SeedState:
        """Export the seed for the packet (WP9)."""
        schedule = self.schedule
        metrics = {
            "alpha": schedule.value() if self.stage in lifecycle.BLENDED else 0.0,
            "alpha_steps": float(schedule.step),
            "alpha_total_steps": float(schedule.total_steps),
            "alpha_temperature": schedule.temperature,
            "alpha_schedule": float(SCHEDULES.index(schedule.method)),
            "blend_allowed": 1.0,
            "risk_tolerance": 0.5,
            "steps_in_stage": float(self.steps_in_stage),
        }
        if self.loss_at_graft is not None and math.isfinite(loss_now):
            metrics["loss_since_graft"] = loss_now - self.loss_at_graft
        state = SeedState(
            seed_id=self.seed_id, stage=self.stage, layer_depth=self.depth, metrics=metrics, age_epochs=self.age_epochs
        )
        if self.gradient_norm is not None and math.isfinite(self.gradient_norm):
            state.gradient_norm = self.gradient_norm
        if self.optimizer is not None:
            state.learning_rate = self.optimizer.param_groups[0]["lr"]
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs."""
        module = self.site.seed
        return {
            "stage": int(self.stage),
            "blueprint_id": self.blueprint_id,
            "extras_digest": self.extras_digest,
            "steps_in_stage": self.steps_in_stage,
            "age_epochs": self.age_epochs,
            "schedule": dataclasses.asdict(self.schedule),
            "loss_at_graft": self.loss_at_graft,
            "embargo_left": self.embargo_left,
            "module": copy.deepcopy(module.state_dict()) if module is not None else None,
            "feature_shape": self.site.output_shape,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer is not None else None,
        }
