from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper_rpc.blending import BLENDING_METHODS
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage, SeedState
from esper_rpc.proto.tamiyo.v1 import RunSeed, RunSite
from esper_servers.blueprints.kernel import dtype_name

from . import lifecycle
from .blending.alpha import AlphaSchedule, band_after, gradient_clip
from .blending.config import BlendConfig, read_blend_config
from .blending.steadiness import Steadiness
from .learning import clip_gradients, learn, optimizer_of
from .site import Site

CLIP_NORM = 1.0
# A gradient scaler makes single infinite gradients; this many in a row are the seed's own (requirements 4.4).
VIOLATIONS = 3
DEFAULT_RISK_TOLERANCE = 0.5
_SAVED = (
    "blueprint_id", "risk", "steps_in_stage", "age_epochs", "updates", "violations", "gradient_norm",
    "loss_at_graft", "grafted_at", "embargo_left", "is_fine_tuning", "adopted_as", "alpha_band",
    "fallback_used",
)  # fmt: skip


class IllegalMove(Exception):
    """A stage cannot follow the present one."""


@dataclass
class SeedSlot:
    """One seed: where it lives, its stage, its optimizer and its alpha. Touched at the safe point only."""

    seed_id: str
    site_id: str
    site: Site
    depth: int
    blueprint_id: str = ""
    extras_digest: bytes = b""
    manifest: bytes = b""
    """The serialised KernelManifest of its module."""
    risk: float = 0.0
    steps_in_stage: int = 0
    age_epochs: int = 0
    updates: int = 0
    """Steps of its own optimizer since it was planted."""
    violations: int = 0
    """Gradients in a row that were not finite."""
    schedule: AlphaSchedule = field(default_factory=AlphaSchedule)
    blend: BlendConfig = field(default_factory=BlendConfig)
    alpha_band: int = 0
    """Who leads in the blend: 0 the host, 1 neither, 2 the seed."""
    optimizer: torch.optim.Optimizer | None = None
    gradient_norm: float | None = None
    loss_at_graft: float | None = None
    grafted_at: int = 0
    """The last step whose output it had no part in."""
    steadiness: Steadiness = field(default_factory=Steadiness)
    fallback_used: bool = False
    """Whether something simpler stands in for what was asked: CONVEX for its mode, or the host for its kernel."""
    embargo_left: float = 0.0
    """Seconds until it may germinate again."""
    adopted_as: int = 0
    """Its number among the fossils that joined the user's optimizer, from 1; the groups there stand in this order."""
    paused_until: float = 0.0

    @property
    def stage(self) -> SeedLifecycleStage.ValueType:
        """The stage, which lives with the site because the forward pass depends on it."""
        return self.site.stage

    @property
    def is_fine_tuning(self) -> bool:
        """Whether it learns although it stands on trial; the site has to know, since it computes no gradients then."""
        return self.site.is_fine_tuning

    @is_fine_tuning.setter
    def is_fine_tuning(self, learns: bool) -> None:
        self.site.is_fine_tuning = learns

    @property
    def parameter_count(self) -> int:
        """Parameters that the seed adds to the model."""
        return sum(p.numel() for p in self.site.seed.parameters()) if self.site.seed is not None else 0

    @property
    def has_touched_the_output(self) -> bool:
        """Whether the output of the model has, or has had, a part of it."""
        return self.stage in lifecycle.BLENDED or self.stage == lifecycle.FOSSILIZED

    def move(self, stage: SeedLifecycleStage.ValueType) -> None:
        """Change the stage; raises IllegalMove."""
        if not lifecycle.is_legal(self.stage, stage):
            raise IllegalMove(f"{self.seed_id} cannot move from stage {self.stage} to {stage}")
        self.site.stage = stage
        self.steps_in_stage, self.is_fine_tuning = 0, False
        if stage == lifecycle.SHADOWING:
            # A gate opens a little below one, and what becomes a fossil is what stands on trial.
            self._set_alpha(1.0)

    def plant(self, module: nn.Module, blueprint_id: str, extras_digest: bytes) -> None:
        """Put a module into the site, with an optimizer of its own."""
        self.site.hold(module)
        self.blueprint_id, self.extras_digest = blueprint_id, extras_digest
        self.reset()
        self.optimizer = optimizer_of(self.site.own_parameters)

    def uproot(self) -> None:
        """Take the module out; the site is the host alone again."""
        self.site.hold(None)
        self.optimizer, self.gradient_norm, self.blueprint_id, self.extras_digest = None, None, "", b""
        self.manifest, self.risk, self.alpha_band, self.blend = b"", 0.0, 0, BlendConfig()

    def reset(self) -> None:
        """Forget what was counted and measured of the seed that grew here."""
        self.schedule, self.blend, self.alpha_band, self.steadiness = AlphaSchedule(), BlendConfig(), 0, Steadiness()
        self.updates, self.violations, self.age_epochs, self.gradient_norm = 0, 0, 0, None
        self.loss_at_graft, self.grafted_at, self.paused_until, self.fallback_used = None, 0, 0.0, False

    def is_clean(self) -> bool:
        """Whether nothing is counted or measured, as after `reset`."""
        counted = self.updates or self.violations or self.age_epochs or self.grafted_at or self.alpha_band
        measured = self.gradient_norm is not None or self.loss_at_graft is not None or self.steadiness.strengths
        return not counted and not measured

    def advance_alpha(self) -> float:
        """Move alpha one step on."""
        return self._set_alpha(self.schedule.advance())

    def _set_alpha(self, alpha: float) -> float:
        self.site.alpha, self.alpha_band = alpha, band_after(self.alpha_band, alpha)
        return alpha

    def begin_blending(self, schedule: AlphaSchedule, *, loss: float | None, step: int) -> None:
        """Take up a schedule, and remember what there was before the output had a part of this seed."""
        self.schedule, self.loss_at_graft, self.grafted_at = schedule, loss, step
        self.steadiness = Steadiness()

    def note_blend(self) -> None:
        """Measure the forward pass of the step that ended, if the seed had a part in it."""
        measured = self.site.take_strength()
        if self.stage == lifecycle.BLENDING and measured is not None:
            self.steadiness.note(float(measured), self.site.hook_ms)

    def blend_as(self, annotations: Mapping[str, str]) -> str:
        """Blend as a command says; why that cannot be and it is CONVEX instead, empty when it can."""
        config, problem = read_blend_config(annotations, self.site.seed_channels)
        self._use(config)
        return problem

    def _use(self, config: BlendConfig) -> None:
        self.blend = config
        self.site.mix_as(config)

    def step_optimizer(self) -> None:
        """Use this step's gradients, if the seed learns in its stage; those that are not finite are dropped."""
        learns = self.stage in (lifecycle.TRAINING, lifecycle.BLENDING) or self.is_fine_tuning
        if self.optimizer is not None and learns and not self.site.paused:
            self._update(self.optimizer)
        self.clear_gradients()

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        most = gradient_clip(self.site.alpha) if self.stage == lifecycle.BLENDING else CLIP_NORM
        norm = clip_gradients(self.site.own_parameters, most)
        if norm is None:
            return
        self.gradient_norm = norm
        if not math.isfinite(norm):
            self.violations += 1
            return
        self.violations, self.updates = 0, self.updates + 1
        learn(optimizer)

    def clear_gradients(self) -> None:
        """Forget gradients, which the user's zero_grad may not see."""
        # Not those of all parameters of the module: it may have taken one of the host's since.
        for parameter in self.site.own_parameters:
            parameter.grad = None

    def has_failed(self) -> bool:
        """Whether the seed raised, gave something that is not a number, or cannot learn."""
        return bool(self.site.failure) or self.violations >= VIOLATIONS or self.site.gave_non_finite()

    def has_finite_weights(self) -> bool:
        """Whether every parameter is a number."""
        return self.site.seed is not None and _all_finite(self.site.seed.parameters())

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
            alpha=self.site.alpha,
        )

    def state(self, loss_now: float) -> SeedState:
        """Export the seed for the packet (WP9)."""
        state = SeedState(
            seed_id=self.seed_id, stage=self.stage, layer_depth=self.depth, metrics=self._metrics(loss_now),
            age_epochs=self.age_epochs, risk_score=1.0 if self.violations else self.risk,
        )  # fmt: skip
        if self.gradient_norm is not None:
            state.gradient_norm = self.gradient_norm
        if self.optimizer is not None:
            state.learning_rate = self.optimizer.param_groups[0]["lr"]
        return state

    def _metrics(self, loss_now: float) -> dict[str, float]:
        schedule = self.schedule
        metrics = {
            "alpha": self.site.alpha,
            "alpha_steps": float(schedule.step),
            "alpha_total_steps": float(schedule.total_steps),
            "alpha_temperature": schedule.temperature,
            "alpha_band": float(self.alpha_band),
            "alpha_schedule": float(BLENDING_METHODS.index(schedule.method)),
            "blend_allowed": float(not self.site.failure),
            "risk_tolerance": DEFAULT_RISK_TOLERANCE,
            "steps_in_stage": float(self.steps_in_stage),
        }
        if self.loss_at_graft is not None:
            metrics["loss_at_graft"] = self.loss_at_graft
            if math.isfinite(loss_now):
                metrics["loss_since_graft"] = loss_now - self.loss_at_graft
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as tensors and plain values."""
        module = self.site.seed
        return {
            **self.plain_state(),
            "module": copy.deepcopy(dict(module.state_dict())) if module is not None else None,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer is not None else None,
        }

    def plain_state(self) -> dict[str, Any]:
        """Return all of it but the tensors, in plain values."""
        return {
            **{name: getattr(self, name) for name in _SAVED},
            # In hexadecimal: torch.load(weights_only=True) reads no bytes.
            "extras_digest": self.extras_digest.hex(),
            "manifest": self.manifest.hex(),
            "stage": int(self.stage),
            "alpha": self.site.alpha,
            "schedule": dataclasses.asdict(self.schedule),
            "blend": {**dataclasses.asdict(self.blend), "alpha_vec": list(self.blend.alpha_vec)},
            "strengths": list(self.steadiness.strengths),
            "feature_shape": list(self.site.output_shape),
            "input_shape": list(self.site.input_shape),
        }

    def load_state_dict(self, saved: dict[str, Any], module: nn.Module | None) -> None:
        """Restore what `state_dict` returned; the caller built the module and loaded its weights."""
        self.uproot()
        if module is not None:
            self.plant(module, saved["blueprint_id"], bytes.fromhex(saved["extras_digest"]))
        self.load_plain_state(saved)
        if saved["optimizer"] is None:
            self.optimizer = None
        elif self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))

    def load_plain_state(self, saved: dict[str, Any]) -> None:
        """Restore what `plain_state` returned, around the module that is here."""
        self.extras_digest, self.manifest = bytes.fromhex(saved["extras_digest"]), bytes.fromhex(saved["manifest"])
        self.site.output_shape, self.site.input_shape = tuple(saved["feature_shape"]), tuple(saved["input_shape"])
        for name in _SAVED:
            setattr(self, name, saved[name])
        self.site.stage, self.site.alpha = saved["stage"], saved["alpha"]
        self.schedule, self.steadiness = AlphaSchedule(**saved["schedule"]), Steadiness(saved["strengths"])
        self._use(BlendConfig.of(saved["blend"]))


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
