"""The figures of requirements 4.4 and 4.5 stand where nothing else is set."""

from __future__ import annotations

import pytest

from esper_rpc.breaker import BreakerConfig
from esper_rpc.envelope import authenticity, verification
from esper_rpc.pause_quota import PauseConfig
from esper_servers.kasmina import memory
from esper_servers.kasmina.blending.alpha import BANDS, HYSTERESIS, AlphaSchedule, gradient_clip
from esper_servers.kasmina.gates.config import GateConfig
from esper_servers.kasmina.isolation import isolation
from esper_servers.kasmina.kernels import library as kernel_library
from esper_servers.kasmina.kernels.library import KernelConfig
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.kasmina.memory import MemoryConfig

SECOND_NS = 10**9


@pytest.mark.parametrize(
    ("breaker", "failures", "rest_seconds"),
    [
        (BreakerConfig(), 5, 60.0),
        (isolation.BREAKER_CONFIG, 3, 30.0),
        (memory.BREAKER_CONFIG, 5, 60.0),
        (kernel_library.BREAKER_CONFIG, 10, 30.0),
    ],
    ids=["default", "gradient_isolation", "memory_bounds", "kernel_loading"],
)
def test_breakers_open_and_rest_as_the_requirements_say(breaker, failures, rest_seconds):
    assert (breaker.failures, breaker.cool_down_seconds, breaker.successes) == (failures, rest_seconds, 3)


def test_commands_are_fresh_for_a_minute_and_remembered_for_five():
    assert verification.VerifierConfig().nonce_ttl_seconds == 5 * 60
    assert verification.PAST_NS == 60 * SECOND_NS
    assert authenticity.FUTURE_NS == 5 * SECOND_NS


def test_caches_memory_and_pauses_are_bounded_as_the_requirements_say():
    kernels, bounds, pauses = KernelConfig(), MemoryConfig(), PauseConfig()
    assert (kernels.entries, kernels.megabytes, kernels.ttl_seconds, kernels.concurrent_fetches) == (1000, 512, 3600, 8)
    assert LocalLimits().live_seeds == 8
    assert (bounds.warn_share, bounds.emergency_share, bounds.collect_epochs) == (0.85, 0.9, 100)
    assert (pauses.units_per_window, pauses.window_seconds, pauses.units_per_request) == (10_000, 60, 1000)


def test_a_graft_has_the_ramp_bands_clip_and_drift_of_the_requirements():
    assert (AlphaSchedule().total_steps, AlphaSchedule().temperature) == (20, 2.0)
    assert (BANDS, HYSTERESIS) == ((0.3, 0.7), 0.02)
    assert [gradient_clip(alpha) for alpha in (0.5, 0.4, 1.0)] == pytest.approx([0.1, 0.05, 0.1 / 26])
    assert GateConfig().output_drift == 0.12
