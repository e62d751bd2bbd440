from __future__ import annotations

from esper_rpc.proto.leyline.v1 import HardwareContext
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER_FOR_SEED, PAUSE, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

GPU_PRESSURE = "gpu_pressure"
CPU_PRESSURE = "cpu_pressure"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge how busy the device is, and whether a busy one has memory left."""
    device = step.hardware
    on_gpu = device if device is not None and device.device_type not in ("", "cpu") else None
    on_cpu = device if device is not None and device.device_type == "cpu" else None
    gpu = _first(step.metric("gpu_util_percent"), _told(on_gpu, "utilization_percent"))
    free = _first(step.metric("gpu_mem_free_gb"), _told(on_gpu, "available_memory_gb"))
    cpu = _first(step.metric("cpu_util_percent"), _told(on_cpu, "utilization_percent"))
    if cpu is None and (gpu is None or free is None):
        return None
    score = max(linear(busy, 0.0, 100.0) for busy in (gpu, cpu) if busy is not None)
    if gpu is not None and gpu > config.gpu_percent and free is not None and free < config.gpu_free_gb:
        return Reading(PAUSE, score, GPU_PRESSURE)
    return Reading(OPTIMIZER_FOR_SEED, score, CPU_PRESSURE) if cpu and cpu > config.cpu_percent else nominal(score)


def _told(device: HardwareContext | None, field: str) -> float | None:
    value = float(getattr(device, field)) if device is not None and device.HasField(field) else None  # type: ignore[arg-type]  # A field by name.
    return value if value == value else None  # NaN is as good as absent.


def _first(told: float | None, otherwise: float | None) -> float | None:
    return otherwise if told is None else told
