from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_client.packet import build_packet
from esper_rpc.proto.leyline.v1 import SeedState
from esper_rpc.testing import FakeClock
from esper_servers.tolaria.metrics import device_metrics
from esper_servers.tolaria.metrics.device_metrics import CpuUse, DeviceMetrics
from esper_servers.tolaria.metrics.step_metrics import StepMetrics, TolariaConfig
from esper_servers.tolaria.metrics.trends import Trend

LOSSES = st.floats(min_value=-1e6, max_value=1e6)
ENRICHED = {
    "loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma", "grad_var", "optimizer_lr", "optimizer_momentum",
    "step_latency_ms", "kasmina.apply_ms", "kasmina.finalize_ms", "input_wait_ms", "grad_conflict_rate",
}  # fmt: skip


def trend_of(values):
    trend = Trend()
    for value in values:
        trend.add(value)
    return trend


@given(st.lists(LOSSES, min_size=1, max_size=50))
def test_the_mean_lies_among_the_values_and_the_variance_is_none_below_zero(values):
    trend = trend_of(values)
    slack = 1e-6 * max(map(abs, values))
    assert min(values) - slack <= trend.mean <= max(values) + slack
    assert 0 <= trend.variance <= (max(values) - min(values)) ** 2 + slack
    assert trend.delta == (values[-1] - values[-2] if len(values) > 1 else 0.0)


@given(LOSSES, st.integers(1, 50))
def test_what_stays_the_same_has_no_variance(value, count):
    trend = trend_of([value] * count)
    assert (trend.mean, trend.variance, trend.delta) == (value, 0.0, 0.0)


@given(st.lists(LOSSES, min_size=1, max_size=30), LOSSES)
def test_a_shift_moves_the_mean_and_leaves_the_variance(values, shift):
    here, there = trend_of(values), trend_of([value + shift for value in values])
    scale = max(1.0, *map(abs, values), abs(shift))
    assert there.mean == pytest.approx(here.mean + shift, abs=1e-6 * scale)
    assert there.variance == pytest.approx(here.variance, abs=1e-6 * scale**2)


@given(st.lists(st.floats(), max_size=50))
def test_whatever_comes_mean_and_variance_are_numbers(values):
    trend = trend_of(values)
    assert math.isfinite(trend.mean)
    assert math.isfinite(trend.deviation)
    assert trend.count == sum(map(math.isfinite, values))


def test_the_newest_values_weigh_most():
    trend = trend_of([0.0] * 100 + [1.0] * 100)
    assert trend.mean == pytest.approx(1.0, abs=1e-4)
    noisy = trend_of([0.0, 1.0] * 500)
    assert noisy.deviation == pytest.approx(statistics.pstdev([0.0, 1.0]), rel=0.1)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def metrics(clock):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25, momentum=0.5)
    return StepMetrics(optimizer=optimizer, clock=clock)


def test_a_step_tells_all_that_is_known(metrics, clock):
    metrics.gradient_conflict_rate = 0.25
    metrics.collect(1.0, gradient_norm=2.0)
    loader = metrics.batches(iter([1, 2]))

    def wait():
        clock.advance(0.003)
        return next(loader)

    assert wait() == 1
    clock.advance(0.047)
    found = metrics.collect(1.5, gradient_norm=4.0, apply_ms=0.5, finalize_ms=0.25)
    assert found.keys() - {"cpu_util_percent", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent"} == ENRICHED
    told = {name: found[name] for name in ENRICHED}
    assert told == pytest.approx(
        {
            "loss_delta": 0.5, "loss_ewma": 1.05, "loss_volatility": math.sqrt(0.9 * 0.5 * 0.05),
            "grad_norm_ewma": 2.2, "grad_var": 0.9 * 2 * 0.2, "optimizer_lr": 0.25, "optimizer_momentum": 0.5,
            "step_latency_ms": 50.0, "kasmina.apply_ms": 0.5, "kasmina.finalize_ms": 0.25, "input_wait_ms": 0.0,
            "grad_conflict_rate": 0.25,
        }
    )  # fmt: skip


def test_the_wait_for_a_batch_is_that_of_its_step(metrics, clock):
    def slow():
        clock.advance(0.02)
        yield 1

    assert list(metrics.batches(slow())) == [1]
    assert metrics.collect(1.0)["input_wait_ms"] == pytest.approx(20.0)
    assert "input_wait_ms" not in metrics.collect(1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_leaves_no_trace_in_the_trends(metrics, loss):
    metrics.collect(1.0)
    assert all(map(math.isfinite, metrics.collect(loss, gradient_norm=loss).values()))
    assert metrics.collect(1.0)["loss_ewma"] == 1.0


def test_what_is_switched_off_or_not_wanted_is_left_out_and_the_trends_go_on(metrics):
    assert StepMetrics(config=TolariaConfig(step_enrichment_enabled=False)).collect(1.0) == {}
    assert metrics.collect(1.0) != {}
    assert metrics.collect(2.0, enrich=False) == {}
    assert metrics.collect(2.0)["loss_delta"] == 0.0


def test_the_momentum_of_adam_is_its_first_beta():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3, betas=(0.8, 0.99))
    found = StepMetrics(optimizer=optimizer).collect(1.0)
    assert (found["optimizer_lr"], found["optimizer_momentum"]) == (1e-3, 0.8)


def test_copies_cost_nothing_where_there_is_no_device(metrics, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with metrics.copying():
        pass
    assert "h2d_copy_ms" not in metrics.collect(1.0)


def test_copies_to_a_device_are_told_when_they_are_done_and_waited_for_by_nobody(metrics, clock, monkeypatch):
    done = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock()

        def query(self):
            return bool(done)

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(metrics._devices, "read", lambda **_: {})
    for milliseconds in (2, 3):
        with metrics.copying():
            clock.advance(milliseconds / 1e3)
    assert "h2d_copy_ms" not in metrics.collect(1.0)
    done.append(True)
    assert metrics.collect(1.0)["h2d_copy_ms"] == pytest.approx(5.0)
    assert "h2d_copy_ms" not in metrics.collect(1.0)


def test_a_packet_with_ten_seeds_and_every_metric_is_below_two_and_a_half_kilobytes(metrics):
    metrics.gradient_conflict_rate = 0.25
    list(metrics.batches([1]))
    enriched = metrics.collect(1.5, gradient_norm=4.0, apply_ms=0.5, finalize_ms=0.25) | {
        "cpu_util_percent": 50.0, "gpu_mem_used_gb": 1.0, "gpu_mem_free_gb": 2.0, "gpu_util_percent": 3.0,
        "h2d_copy_ms": 0.5, "step_latency_ms": 50.0, "accuracy": 0.5, "tamiyo_latency_ms": 3.0, "gradient_norm": 1.0,
        "samples_per_s": 100.0, "hook_latency_ms": 4.0,
    }  # fmt: skip
    keys = ("alpha", "alpha_steps", "alpha_total_steps", "alpha_temperature", "blend_allowed", "risk_tolerance")
    seeds = [
        SeedState(
            seed_id=f"seed-layer{number}", stage=4, gradient_norm=1.0, learning_rate=0.1, layer_depth=number,
            metrics=dict.fromkeys(keys, 0.5), age_epochs=3, risk_score=0.1,
        )
        for number in range(10)
    ]  # fmt: skip
    packet = build_packet(
        run_id="run-0123456789ab", epoch=9, global_step=10**6, loss=1.5, metrics=enriched, seeds=seeds
    )
    assert len(packet.training_metrics) > 20
    assert packet.ByteSize() < 2560


def proc_stat(path, *numbers):
    path.write_text("cpu  " + " ".join(map(str, numbers)) + " 0 0\ncpu0 1 2 3\n")
    return path


def test_how_busy_the_processors_are_follows_from_two_readings(tmp_path):
    use = CpuUse(proc_stat(tmp_path / "stat", 100, 0, 100, 800, 0, 0, 0, 0))
    assert use.read() == {}
    assert use.read() == {}
    proc_stat(tmp_path / "stat", 150, 0, 125, 820, 5, 0, 0, 0)
    assert use.read() == {"cpu_util_percent": pytest.approx(75.0)}


def test_a_source_that_fails_is_left_out_for_good_and_the_others_stay(monkeypatch):
    asked = []

    def broken():
        asked.append(1)
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_metrics, "_gpu_use", broken)
    monkeypatch.setattr(device_metrics, "_gpu_memory", lambda: {"gpu_mem_free_gb": 1.0})
    devices = DeviceMetrics(sample_seconds=0.0)
    assert [devices.read()["gpu_mem_free_gb"] for _ in range(3)] == [1.0] * 3
    assert len(asked) == 1


def test_devices_are_read_once_in_a_while_or_when_asked(monkeypatch):
    clock, asked = FakeClock(), []
    monkeypatch.setattr(device_metrics.CpuUse, "read", lambda _: asked.append(1) or {"cpu_util_percent": len(asked)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices = DeviceMetrics(sample_seconds=1.0, clock=clock)
    assert [devices.read()["cpu_util_percent"] for _ in range(3)] == [1, 1, 1]
    assert devices.read(now=True) == {"cpu_util_percent": 2}
    clock.advance(1.0)
    assert devices.read() == {"cpu_util_percent": 3}
