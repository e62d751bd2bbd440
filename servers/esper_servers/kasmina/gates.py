"""The checks G0 to G5 between two stages. Each answers None when it is passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from esper_rpc.proto.leyline.v1 import SeedLifecycleGate as Gate

from . import reasons

if TYPE_CHECKING:
    from .seed import SeedSlot

ALPHA_DONE: Final = 0.99


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a gate stays shut."""

    reason: str
    culls: bool = False
    """Whether the seed has failed. Otherwise it is only too early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Thresholds of the gates."""

    training_steps: int = 1
    """Steps with a finite gradient that a seed needs before it blends."""
    shadowing_steps: int = 1
    probation_steps: int = 1
    loss_tolerance: float = 0.1
    """How far the smoothed loss may lie above the one at the graft, as a share of it."""


def check(gate: Gate, slot: SeedSlot, loss: float | None, config: GateConfig) -> Refusal | None:
    """Run one gate; `loss` is the smoothed training loss."""
    return _CHECKS[gate](slot, loss, config)


def _sanity(slot: SeedSlot, _loss: float | None, _config: GateConfig) -> Refusal | None:
    return None if slot.branch.module is None else Refusal(reasons.ILLEGAL_TRANSITION)


def _gradient_health(slot: SeedSlot, _loss: float | None, config: GateConfig) -> Refusal | None:
    if not _is_finite(slot):
        return Refusal(reasons.NON_FINITE, culls=True)
    if slot.updates < max(1, config.training_steps):
        return Refusal(reasons.NO_GRADIENT)
    return None


def _stability(slot: SeedSlot, _loss: float | None, _config: GateConfig) -> Refusal | None:
    if slot.output_was_non_finite() or not _is_finite(slot):
        return Refusal(reasons.NON_FINITE, culls=True)
    return Refusal(reasons.ALPHA_INCOMPLETE) if slot.branch.alpha < ALPHA_DONE else None


def _interface(slot: SeedSlot, _loss: float | None, config: GateConfig) -> Refusal | None:
    if slot.output_was_non_finite():
        return Refusal(reasons.NON_FINITE, culls=True)
    if slot.branch.paused:
        return Refusal(reasons.PAUSED)
    return Refusal(reasons.TOO_EARLY) if slot.steps_in_stage < config.shadowing_steps else None


def _system_impact(slot: SeedSlot, loss: float | None, config: GateConfig) -> Refusal | None:
    if slot.output_was_non_finite() or not _is_finite(slot):
        return Refusal(reasons.NON_FINITE, culls=True)
    if slot.branch.paused or slot.steps_in_stage < config.probation_steps:
        return Refusal(reasons.PAUSED if slot.branch.paused else reasons.TOO_EARLY)
    before = slot.loss_at_graft
    if before is not None and (loss is None or not loss <= before + config.loss_tolerance * abs(before)):
        return Refusal(reasons.LOSS_REGRESSED, culls=True)
    return None


def _reset(slot: SeedSlot, _loss: float | None, _config: GateConfig) -> Refusal | None:
    is_clean = slot.branch.module is None and slot.optimizer is None and not slot.blueprint_id
    return None if is_clean else Refusal(reasons.TOO_EARLY)


def _is_finite(slot: SeedSlot) -> bool:
    module = slot.branch.module
    return module is not None and all(bool(torch.isfinite(p).all()) for p in module.parameters())


_CHECKS: Mapping[Gate, Callable[[SeedSlot, float | None, GateConfig], Refusal | None]] = {
    Gate.SEED_LIFECYCLE_GATE_G0_SANITY: _sanity,
    Gate.SEED_LIFECYCLE_GATE_G1_GRADIENT_HEALTH: _gradient_health,
    Gate.SEED_LIFECYCLE_GATE_G2_STABILITY: _stability,
    Gate.SEED_LIFECYCLE_GATE_G3_INTERFACE: _interface,
    Gate.SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT: _system_impact,
    Gate.SEED_LIFECYCLE_GATE_G5_RESET: _reset,
}
