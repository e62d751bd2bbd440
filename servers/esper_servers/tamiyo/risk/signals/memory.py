from __future__ import annotations

import math

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, PAUSE, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

MEMORY_BLOCKING = "memory_blocking"
MEMORY_PRESSURE = "memory_pressure"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge the share of the device's memory that is in use."""
    used = used_share(step)
    if used is None:
        return None
    score = linear(used, config.memory_base, config.memory_emergency)
    if used > config.memory_blocking:
        return Reading(PAUSE, score, MEMORY_BLOCKING)
    return Reading(NO_SEED, score, MEMORY_PRESSURE) if used > config.memory_base else nominal(score)


def used_share(step: StepSignals) -> float | None:
    """Return it by the metrics, else by the description of the device; None when they make no sense."""
    used, free = step.metric("gpu_mem_used_gb"), step.metric("gpu_mem_free_gb")
    if used is not None and free is not None:
        return _share(used, used + free)
    device = step.hardware
    if device is None or not (device.HasField("total_memory_gb") and device.HasField("available_memory_gb")):
        return None
    return _share(device.total_memory_gb - device.available_memory_gb, device.total_memory_gb)


def _share(used: float, total: float) -> float | None:
    return used / total if 0 <= used <= total and 0 < total < math.inf else None
