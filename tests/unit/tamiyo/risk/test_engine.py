from __future__ import annotations

import math
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import HardwareContext, HealthStatus, MessagePriority, SeedState, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.policy import sample, schema
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.engine import judge
from esper_servers.tamiyo.risk.events import priority_of
from esper_servers.tamiyo.risk.history import RiskHistory
from esper_servers.tamiyo.risk.step_signals import StepSignals

CONFIG = RiskConfig()
STEP_METRICS = {"gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 2.0}
METRICS = [
    "loss", "gradient_norm", "samples_per_s", "hook_latency_ms", "step_latency_ms", "kasmina.apply_ms",
    "kasmina.finalize_ms", "loss_delta", "loss_volatility", "grad_var", "grad_conflict_rate", "optimizer_lr",
    "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent", "kasmina.isolation.violations",
    "kasmina.breaker.state",
]  # fmt: skip


def verdict(metrics=(), *, conservative=False, **fields):
    step = StepSignals(metrics=STEP_METRICS | dict(metrics), **({"loss": 0.5} | fields))
    return judge(step, CONFIG, conservative=conservative)


def memory(share):
    return {"gpu_mem_used_gb": 100 * share, "gpu_mem_free_gb": 100 * (1 - share)}


def test_a_calm_step_allows_everything():
    calm = verdict()
    assert (calm.allowed, calm.forced, calm.reason, calm.holds) == ((True,) * 4, None, "", False)


@pytest.mark.parametrize(
    ("metrics", "fields", "forced", "replaces", "allowed", "reason"),
    [
        ({}, {"loss_rise": 1.0}, schema.KIND_PAUSE, False, (True, False, False, True), "loss_spike"),
        ({}, {"loss_rise": 0.1}, schema.KIND_OPTIMIZER, False, (True, False, True, True), "loss_drift"),
        ({"kasmina.apply_ms": 40.0}, {}, None, True, (True, False, True, True), "apply_latency"),
        ({"hook_latency_ms": 60.0}, {}, None, False, (True, False, True, True), "hook_budget"),
        (memory(0.9), {}, schema.KIND_PAUSE, False, (True, False, False, True), "memory_blocking"),
        # The most severe demand gives the reason.
        ({"hook_latency_ms": 60.0}, {"loss_rise": 0.1}, schema.KIND_OPTIMIZER, False, (True, False, True, True), "loss_drift"),
        ({"kasmina.apply_ms": 40.0} | memory(0.9), {"loss_rise": 0.1}, schema.KIND_PAUSE, False, (True, False, False, True), "memory_blocking"),
    ],
)  # fmt: skip
def test_the_demand_decides_what_remains(metrics, fields, forced, replaces, allowed, reason):
    judged = verdict(metrics, **fields)
    assert (judged.forced, judged.replaces_seed, judged.allowed, judged.reason) == (forced, replaces, allowed, reason)


@pytest.mark.parametrize(
    ("fields", "forced", "reason"),
    [
        ({}, None, "conservative_mode"),
        ({"loss_rise": 0.1}, None, "conservative_mode"),
        ({"loss_rise": 1.0}, schema.KIND_PAUSE, "loss_spike"),
    ],
)
def test_conservative_mode_leaves_only_the_pause_of_a_high_risk(fields, forced, reason):
    held = verdict(conservative=True, **fields)
    assert (held.forced, held.reason) == (forced, reason)
    assert not held.allowed[schema.KIND_SEED]
    assert not held.allowed[schema.KIND_OPTIMIZER]
    assert not held.replaces_seed


@pytest.mark.parametrize(
    ("metrics", "variance", "score"),
    [
        ({}, 0.0, 0.0),
        ({"gradient_norm": 20.0}, 0.0, 0.3 / 0.75),
        ({"gradient_norm": 20.0} | memory(0.5), 0.0, 0.3),
        ({"gradient_norm": 12.5, "step_latency_ms": 300.0} | memory(0.5), 0.3, 0.3 / 2 + 0.25 / 2 + 0.2 / 2),
    ],
    ids=["calm", "memory is not known", "all are known", "half of three"],
)
def test_the_score_is_weighted_over_the_dimensions_that_are_known(metrics, variance, score):
    assert verdict(metrics, loss_variance=variance).score == pytest.approx(score)


def test_three_dimensions_in_emergency_are_a_high_risk():
    config = RiskConfig(step_latency_ms=60_000.0)
    metrics = STEP_METRICS | {"gradient_norm": 18.0, "step_latency_ms": 450.0}
    two = judge(StepSignals(metrics=metrics, loss=0.5), config, conservative=False)
    three = judge(StepSignals(metrics=metrics, loss=0.5, loss_variance=0.45), config, conservative=False)
    assert (two.forced, two.reason) == (None, "gradient_norm")
    assert (three.forced, three.reason) == (schema.KIND_PAUSE, "risk_emergency")


def test_high_risk_enters_conservative_mode_when_it_repeats():
    assert [verdict(loss=math.nan, high_steps=before).holds for before in range(4)] == [False, False, True, True]
    assert not verdict(high_steps=9).holds


@pytest.mark.parametrize(
    ("metrics", "fields", "priority"),
    [
        ({}, {"loss_rise": 1.0}, "HIGH"),
        ({"hook_latency_ms": 60.0}, {}, "HIGH"),
        ({"kasmina.isolation.violations": 1.0}, {}, "HIGH"),
        ({"kasmina.apply_ms": 40.0}, {}, "NORMAL"),
    ],
)
def test_an_event_has_the_priority_of_its_reason(metrics, fields, priority):
    assert priority_of(verdict(metrics, **fields)) == MessagePriority.Value(f"MESSAGE_PRIORITY_{priority}")


@pytest.mark.parametrize(
    "settings_of", [{"gradient_base": 30.0}, {"memory_base": 0.95}, {"latency_emergency_ms": 100.0}, {"coverage": 2.0}]
)
def test_thresholds_out_of_order_or_range_are_refused(settings_of):
    with pytest.raises(ConfigError):
        RiskConfig(**settings_of)


numbers = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, 1e-30])
seed_states = st.builds(
    SeedState,
    stage=st.integers(0, 40),
    gradient_norm=st.none() | numbers,
    risk_score=st.none() | numbers,
)
devices = st.builds(
    HardwareContext,
    device_type=st.sampled_from(["", "cpu", "cuda"]),
    total_memory_gb=st.none() | numbers,
    available_memory_gb=st.none() | numbers,
    utilization_percent=st.none() | numbers,
)
packets = st.builds(
    SystemStatePacket,
    training_metrics=st.dictionaries(st.sampled_from(METRICS), numbers),
    training_loss=st.none() | numbers,
    seed_states=st.lists(seed_states, max_size=4),
    hardware_context=st.none() | devices,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(packets, max_size=5), st.booleans())
def test_no_input_raises_and_a_seed_needs_every_signal_to_be_nominal(run, conservative):
    history = RiskHistory()
    for packet in run:
        judged = judge(history.observe(packet, packet.seed_states, (), CONFIG), CONFIG, conservative=conservative)
        history.settle(is_high=judged.is_high, is_nominal=judged.is_nominal)
        nominal = all(r.status == HealthStatus.HEALTH_STATUS_HEALTHY for r in judged.readings.values())
        assert judged.allowed[schema.KIND_SEED] == (nominal and not conservative and judged.is_nominal)
        assert judged.reason or judged.is_nominal
        assert 0.0 <= judged.score <= 1.0
        assert all(0.0 <= reading.score <= 1.0 for reading in judged.readings.values())


def test_the_history_counts_what_comes_in_a_row():
    history = RiskHistory()
    slow = [SystemStatePacket(training_metrics={"loss": 0.5, "hook_latency_ms": ms}) for ms in (60, 60, 1, 60)]
    assert [history.observe(packet, (), (), CONFIG).slow_hooks for packet in slow] == [1, 2, 0, 1]
    for is_high in (True, True, False, True):
        history.settle(is_high=is_high, is_nominal=not is_high)
    assert history.high_steps == 1


@pytest.mark.parametrize(("scale", "least", "most"), [(0.01, 0.0, 0.1), (100.0, 0.5, 2.0)])
def test_gradients_scatter_only_where_they_are_large(scale, least, most):
    history = RiskHistory()
    for norm in (1.0, 5.0, 0.1, 9.0, 0.2):
        observed = history.observe(SystemStatePacket(training_metrics={"gradient_norm": scale * norm}), (), (), CONFIG)
    assert least <= observed.gradient_volatility <= most


def test_a_large_loss_is_judged_relative_to_its_mean():
    history = RiskHistory()
    for loss in (1000.0, 1100.0, 900.0, 1000.0, 1050.0):
        observed = history.observe(SystemStatePacket(training_metrics={"loss": loss}), (), (), CONFIG)
    assert 0 < observed.loss_variance < 0.05


def test_a_judgement_is_cheap():
    """30 µs on an idle core; the bound leaves room for a busy machine and still catches a slip of ten times."""
    packet = SystemStatePacket(
        training_metrics=dict.fromkeys(METRICS, 0.5),
        seed_states=sample.sample_states(Stage.SEED_LIFECYCLE_STAGE_TRAINING),
    )
    history = RiskHistory()

    def once():
        judge(history.observe(packet, packet.seed_states, (), CONFIG), CONFIG, conservative=False)

    assert min(timeit.repeat(once, number=100, repeat=10)) / 100 < 300e-6
