from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from esper_rpc.proto.leyline.v1 import MetricPoint

WINDOW = 256
_QUANTILES = (0.5, 0.95)


class Latencies:
    """The last latencies of one kind of work, told as their quantiles. Safe to use from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._window: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Note one."""
        self._window.append(seconds * 1e3)

    def metrics(self) -> Iterator[MetricPoint]:
        """Yield the quantiles, nearest rank; nothing before there is a latency."""
        ordered = sorted(self._window.copy())
        for quantile in _QUANTILES if ordered else ():
            value = ordered[math.ceil(len(ordered) * quantile) - 1]
            yield MetricPoint(name=self._name, value=value, unit="ms", attributes={"quantile": f"{quantile:g}"})
