from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

log = structlog.get_logger(__name__)

CPU_TIMES = Path("/proc/stat")
GIB = 2**30
_IDLE, _IOWAIT = 3, 4
Reading = Callable[[], dict[str, float]]


class DeviceMetrics:
    """Memory and use of the devices, read anew after a while at the earliest: some of it takes a millisecond.

    A source that fails is left out from then on, and told of once.
    """

    def __init__(self, sample_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._sample_seconds = sample_seconds
        self._clock = clock
        self._read_at = float("-inf")
        self._values: dict[str, float] = {}
        self._sources: dict[str, Reading] = {"cpu": CpuUse().read}
        if torch.cuda.is_available():
            self._sources |= {"gpu_memory": _gpu_memory, "gpu_use": _gpu_use}

    def read(self, *, now: bool = False) -> dict[str, float]:
        """Return the newest values; `now` reads them anew."""
        at = self._clock()
        if now or at - self._read_at >= self._sample_seconds:
            self._read_at = at
            self._values = {name: value for source in list(self._sources) for name, value in self._ask(source).items()}
        return self._values

    def _ask(self, source: str) -> dict[str, float]:
        try:
            return self._sources[source]()
        except Exception as error:  # noqa: BLE001  # Drivers raise what they like; a metric is not worth a step.
            log.info("device_metric_left_out", source=source, problem=str(error)[:200])
            del self._sources[source]
            return {}


class CpuUse:
    """How busy the processors of this machine were since the reading before."""

    def __init__(self, times: Path = CPU_TIMES) -> None:
        self._times = times
        self._before: tuple[int, int] | None = None

    def read(self) -> dict[str, float]:
        """Return cpu_util_percent; nothing the first time, or while no time has passed."""
        with self._times.open() as file:
            numbers = [int(number) for number in file.readline().split()[1:9]]
        total, idle = sum(numbers), numbers[_IDLE] + numbers[_IOWAIT]
        before, self._before = self._before, (total, idle)
        if before is None or total <= before[0]:
            return {}
        share = 1 - (idle - before[1]) / (total - before[0])
        return {"cpu_util_percent": 100 * min(1.0, max(0.0, share))}


def _gpu_memory() -> dict[str, float]:
    free, total = torch.cuda.mem_get_info()
    return {"gpu_mem_used_gb": (total - free) / GIB, "gpu_mem_free_gb": free / GIB}


def _gpu_use() -> dict[str, float]:
    return {"gpu_util_percent": float(torch.cuda.utilization())}
