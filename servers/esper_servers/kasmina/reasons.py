"""Stable reasons that an outcome or a seed event may carry. They are words on the wire: never change one."""

from __future__ import annotations

UNKNOWN_SEED = "unknown_seed"
ILLEGAL_TRANSITION = "illegal_transition"
DEADLINE_PASSED = "deadline_passed"
INVALID_PARAMETERS = "invalid_parameters"

UNKNOWN_BLUEPRINT = "unknown_blueprint"
KERNEL_UNAVAILABLE = "kernel_unavailable"
KERNEL_NOT_READY = "kernel_not_ready"
SHAPE_MISMATCH = "shape_mismatch"
BUILD_FAILED = "build_failed"

NO_GRADIENT = "no_gradient"
NON_FINITE = "non_finite"
ALPHA_INCOMPLETE = "alpha_incomplete"
TOO_EARLY = "too_early"
PAUSED = "paused"
LOSS_REGRESSED = "loss_regressed"

COMMANDED = "commanded"
CANCELLED = "cancelled"
KERNEL_ATTACHED = "kernel_attached"
EMBARGO_STARTED = "embargo_started"
EMBARGO_ELAPSED = "embargo_elapsed"
RESET_DONE = "reset_done"
RESUMED = "resumed"
RESTORED = "restored"
