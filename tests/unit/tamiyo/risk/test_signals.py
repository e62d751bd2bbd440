"""Each row of the table of requirements 2.6, and of the signals beside it."""

from __future__ import annotations

import dataclasses
import math

import pytest

from esper_rpc.proto.leyline.v1 import (
    BlueprintDescriptor,
    CircuitState,
    HandlingClass,
    HardwareContext,
    HazardBand,
    HealthStatus,
    SeedState,
)
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy.graph import BlueprintCandidate
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.engine import SIGNALS
from esper_servers.tamiyo.risk.reading import (
    NO_SEED,
    NOTHING,
    OPTIMIZER,
    OPTIMIZER_FOR_SEED,
    PAUSE,
    PAUSE_AND_HOLD,
)
from esper_servers.tamiyo.risk.step_signals import StepSignals

CONFIG = RiskConfig()
OPEN = float(CircuitState.CIRCUIT_STATE_OPEN)
HALF_OPEN = float(CircuitState.CIRCUIT_STATE_HALF_OPEN)


def step(metrics=(), **fields):
    return StepSignals(metrics=dict(metrics), **({"loss": 0.5} | fields))


def device(kind="cuda", **fields):
    return step(hardware=HardwareContext(device_type=kind, **fields))


def seeds(*states):
    return step(seeds=[SeedState(**state) for state in states])


def in_stages(*names):
    return seeds(*({"stage": Stage.Value(f"SEED_LIFECYCLE_STAGE_{name}")} for name in names))


def grown(*blueprints):
    def make(quarantine_only=False, risk=0.2, **fields):
        descriptor = BlueprintDescriptor(risk=risk, quarantine_only=quarantine_only)
        return BlueprintCandidate(blueprint_id="b", descriptor=descriptor, **fields)

    return step(grown=[make(**blueprint) for blueprint in blueprints])


def band(name):
    return {"hazard_band": HazardBand.Value(f"HAZARD_BAND_{name}")}


def handling(name):
    return {"handling_class": HandlingClass.Value(f"HANDLING_CLASS_{name}")}


def gpu(used, free, busy=None):
    busy = {} if busy is None else {"gpu_util_percent": busy}
    return {"gpu_mem_used_gb": used, "gpu_mem_free_gb": free} | busy


ROWS = [
    # Loss spike: 0.15 is a pause, about half of it the optimizer; within the usual spread it is noise.
    ("loss", step(loss_rise=0.151), PAUSE, "loss_spike"),
    ("loss", step(loss_rise=0.15), OPTIMIZER, "loss_drift"),
    ("loss", step(loss_rise=0.076), OPTIMIZER, "loss_drift"),
    ("loss", step(loss_rise=0.075), NOTHING, ""),
    ("loss", step(loss_rise=9.0, loss_deviation=3.0), NOTHING, ""),
    ("loss", step(loss=math.nan, loss_rise=math.nan), PAUSE, "loss_not_finite"),
    ("loss", step(loss=-math.inf, loss_rise=math.nan), PAUSE, "loss_not_finite"),
    # Latencies.
    ("latency", step({"step_latency_ms": 120.1}), PAUSE, "step_latency"),
    ("latency", step({"step_latency_ms": 120.0}), NOTHING, ""),
    ("latency", step({"kasmina.apply_ms": 30.1}), OPTIMIZER_FOR_SEED, "apply_latency"),
    ("latency", step({"kasmina.apply_ms": 30.0}), NOTHING, ""),
    ("latency", step({"kasmina.finalize_ms": 30.1}), OPTIMIZER_FOR_SEED, "finalize_latency"),
    ("latency", step({"kasmina.finalize_ms": 30.0}), NOTHING, ""),
    ("latency", step({"hook_latency_ms": 50.1}, slow_hooks=1), NO_SEED, "hook_budget"),
    ("latency", step({"hook_latency_ms": 50.1}, slow_hooks=3), PAUSE, "hook_budget"),
    ("latency", step({"hook_latency_ms": 50.0}), NOTHING, ""),
    ("latency", step({"hook_latency_ms": math.inf}), NO_SEED, "hook_budget"),
    # Volatility of loss and gradient, conflicts.
    ("loss_variance", step({"loss_volatility": 0.51}), OPTIMIZER_FOR_SEED, "loss_volatility"),
    ("loss_variance", step({"loss_volatility": 0.5}), NOTHING, ""),
    ("loss_variance", step(loss_variance=0.31), OPTIMIZER_FOR_SEED, "loss_variance"),
    ("loss_variance", step(loss_variance=0.3), NOTHING, ""),
    ("gradient_volatility", step({"grad_var": 1.01}), OPTIMIZER_FOR_SEED, "gradient_variance"),
    ("gradient_volatility", step({"grad_var": 1.0}), NOTHING, ""),
    ("gradient_volatility", step({"grad_conflict_rate": 0.51}), OPTIMIZER_FOR_SEED, "gradient_conflict"),
    ("gradient_volatility", step({"grad_conflict_rate": 0.5}), NOTHING, ""),
    ("gradient_volatility", step(gradient_volatility=1.01), OPTIMIZER_FOR_SEED, "gradient_volatility"),
    ("gradient_norm", step({"gradient_norm": 10.1}), OPTIMIZER_FOR_SEED, "gradient_norm"),
    ("gradient_norm", step({"gradient_norm": 10.0}), NOTHING, ""),
    ("gradient_norm", step({"gradient_norm": math.inf}), NO_SEED, "gradient_not_finite"),
    ("gradient_norm", step({"gradient_norm": math.nan}), NO_SEED, "gradient_not_finite"),
    # Stability: 0.5 of the loss, 0.3 of the gradient, 0.2 of the progress.
    ("stability", step(loss_variance=0.29, gradient_volatility=0.9, loss_trend=-0.1), OPTIMIZER_FOR_SEED, "unstable"),
    ("stability", step(loss_variance=0.29, gradient_volatility=0.1, loss_trend=0.1), NOTHING, ""),
    # Optimiser hints.
    ("optimizer_hints", step({"optimizer_lr": 1e-7, "loss_delta": 0.01}), OPTIMIZER, "learning_rate_vanished"),
    ("optimizer_hints", step({"optimizer_lr": 0.0}, loss_rise=0.01), OPTIMIZER, "learning_rate_vanished"),
    ("optimizer_hints", step({"optimizer_lr": 1e-7, "loss_delta": -0.01}, loss_rise=0.01), NOTHING, ""),
    ("optimizer_hints", step({"optimizer_lr": 1e-3, "loss_delta": 0.01}), NOTHING, ""),
    # Device pressure.
    ("device_pressure", step(gpu(79.6, 0.4, 96.0)), PAUSE, "gpu_pressure"),
    ("device_pressure", step(gpu(20.0, 60.0, 99.0)), NOTHING, ""),
    ("device_pressure", step(gpu(79.6, 0.4, 50.0)), NOTHING, ""),
    ("device_pressure", device(utilization_percent=99, available_memory_gb=0.1), PAUSE, "gpu_pressure"),
    ("device_pressure", step({"cpu_util_percent": 95.1}), OPTIMIZER_FOR_SEED, "cpu_pressure"),
    ("device_pressure", step({"cpu_util_percent": 95.0}), NOTHING, ""),
    ("device_pressure", device("cpu", utilization_percent=99), OPTIMIZER_FOR_SEED, "cpu_pressure"),
    # Memory: 0.85 blocks.
    ("memory", step(gpu(86.0, 14.0)), PAUSE, "memory_blocking"),
    ("memory", step(gpu(84.0, 16.0)), NO_SEED, "memory_pressure"),
    ("memory", step(gpu(80.0, 20.0)), NOTHING, ""),
    ("memory", device(total_memory_gb=100, available_memory_gb=10), PAUSE, "memory_blocking"),
    ("memory", device(total_memory_gb=100, available_memory_gb=50), NOTHING, ""),
    # Blueprint quarantine and BSDS.
    ("blueprint", grown({"quarantine_only": True}), PAUSE, "bp_quarantine"),
    ("blueprint", grown(band("CRITICAL")), PAUSE_AND_HOLD, "bsds_hazard_critical"),
    ("blueprint", grown(handling("QUARANTINE")), PAUSE_AND_HOLD, "bsds_quarantine"),
    ("blueprint", grown(band("HIGH")), OPTIMIZER_FOR_SEED, "bsds_hazard_high"),
    ("blueprint", grown(band("LOW"), band("CRITICAL"), band("HIGH")), PAUSE_AND_HOLD, "bsds_hazard_critical"),
    ("blueprint", grown(band("MEDIUM") | handling("RESTRICTED")), NOTHING, ""),
    # Isolation.
    ("isolation", step({"kasmina.isolation.violations": 1.0}), NO_SEED, "isolation_violations"),
    ("isolation", step({"kasmina.breaker.state": OPEN}), NO_SEED, "kasmina_breaker_open"),
    ("isolation", step({"kasmina.breaker.state": HALF_OPEN, "kasmina.isolation.violations": 0.0}), NOTHING, ""),
    # Lifecycle.
    ("lifecycle", seeds({"gradient_norm": math.nan}), NO_SEED, "seed_diverges"),
    ("lifecycle", seeds({"gradient_norm": 1.0}, {"risk_score": 0.81}), NO_SEED, "seed_risk"),
    ("lifecycle", in_stages("CULLED", "EMBARGOED", "DORMANT"), NO_SEED, "seeds_unsettled"),
    ("lifecycle", in_stages("CULLED", "TRAINING"), NOTHING, ""),
    # Degraded inputs.
    ("degraded_inputs", step(loss=None), NO_SEED, "degraded_inputs"),
    ("degraded_inputs", step({"gradient_norm": 1.0, "samples_per_s": 9.0, "hook_latency_ms": 1.0}), NOTHING, ""),
    ("degraded_inputs", step(), NOTHING, ""),
]  # fmt: skip


@pytest.mark.parametrize(("signal", "signals", "demand", "reason"), ROWS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_row(signal, signals, demand, reason):
    reading = SIGNALS[signal](signals, CONFIG)
    assert (reading.demand, reading.reason) == (demand, reason)
    assert 0.0 <= reading.score <= 1.0


def test_every_signal_has_a_row_that_is_nominal_and_one_that_is_not():
    told = {signal: set() for signal in SIGNALS}
    for signal, _, demand, _ in ROWS:
        told[signal].add(demand == NOTHING)
    assert all(found == {True, False} for found in told.values())


@pytest.mark.parametrize("signal", sorted(set(SIGNALS) - {"degraded_inputs"}))
def test_what_is_not_told_is_not_judged(signal):
    assert SIGNALS[signal](StepSignals(), CONFIG) is None


@pytest.mark.parametrize(
    ("signal", "signals"),
    [
        ("latency", step({"hook_latency_ms": math.nan})),
        ("optimizer_hints", step({"optimizer_lr": math.nan})),
        ("optimizer_hints", step({"optimizer_lr": -1.0})),
        ("memory", step(gpu(math.nan, 1.0))),
        ("memory", step(gpu(-5.0, 1.0))),
        ("memory", step(gpu(0.0, 0.0))),
        ("memory", step(gpu(math.inf, math.inf))),
        ("memory", device(total_memory_gb=10, available_memory_gb=20)),
        ("memory", device(total_memory_gb=10)),
        ("device_pressure", step({"gpu_util_percent": 99.0})),
        ("device_pressure", device("cpu", utilization_percent=math.nan)),
        ("isolation", step({"kasmina.isolation.violations": math.nan})),
    ],
)
def test_what_makes_no_sense_is_not_judged(signal, signals):
    assert SIGNALS[signal](signals, CONFIG) is None


@pytest.mark.parametrize(
    ("demand", "status"),
    [
        (NOTHING, "HEALTHY"),
        (NO_SEED, "DEGRADED"),
        (OPTIMIZER_FOR_SEED, "DEGRADED"),
        (OPTIMIZER, "DEGRADED"),
        (PAUSE, "UNHEALTHY"),
        (PAUSE_AND_HOLD, "CRITICAL"),
    ],
)
def test_a_demand_has_a_category(demand, status):
    reading = next(SIGNALS[signal](signals, CONFIG) for signal, signals, wanted, _ in ROWS if wanted == demand)
    assert HealthStatus.Name(reading.status) == f"HEALTH_STATUS_{status}"


@pytest.mark.parametrize(
    ("signal", "make", "base", "emergency"),
    [
        ("gradient_norm", lambda v: step({"gradient_norm": v}), 5.0, 20.0),
        ("memory", lambda v: step(gpu(v, 1.0 - v)), 0.80, 0.95),
        ("latency", lambda v: step({"step_latency_ms": v}), 100.0, 500.0),
        ("loss_variance", lambda v: step(loss_variance=v), 0.10, 0.50),
    ],
)
def test_the_score_of_a_dimension_is_linear_between_base_and_emergency(signal, make, base, emergency):
    middle = (base + emergency) / 2
    at = (0.9 * base, base, middle, emergency, min(0.99, emergency * 1.04) if emergency < 1 else 2 * emergency)
    scores = [SIGNALS[signal](make(value), CONFIG).score for value in at]
    assert scores == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


def test_the_figures_of_the_requirements_are_the_defaults():
    told = {field.name: field.default for field in dataclasses.fields(RiskConfig)}
    figures = {
        "loss_spike": 0.15, "step_latency_ms": 120, "apply_ms": 30, "finalize_ms": 30, "hook_latency_ms": 50,
        "gradient_base": 5.0, "gradient_emergency": 20.0, "gradient_warning": 10.0, "gradient_weight": 0.30,
        "memory_base": 0.80, "memory_emergency": 0.95, "memory_blocking": 0.85, "memory_weight": 0.25,
        "latency_base_ms": 100, "latency_emergency_ms": 500, "latency_weight": 0.25, "loss_variance_base": 0.10,
        "loss_variance_emergency": 0.50, "loss_variance_warning": 0.3, "loss_variance_weight": 0.20,
        "emergency_score": 0.8, "emergency_dimensions": 3,
    }  # fmt: skip
    assert {name: told[name] for name in figures} == figures
