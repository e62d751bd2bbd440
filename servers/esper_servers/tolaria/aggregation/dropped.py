from __future__ import annotations

from collections.abc import Iterable

from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import GRADIENTS_DROPPED

NOT_FINITE = "not_finite"


class Dropped:
    """Counts gradients that are left out, and tells of each origin once until it is well again."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._counter = GRADIENTS_DROPPED.labels(source)
        self._ill: set[str] = set()

    def note(self, names: Iterable[str], dropped: Iterable[str]) -> None:
        """Note a step: who gave a gradient, and whose was left out."""
        found = set(dropped)
        self._counter.inc(len(found))
        for name in sorted(found - self._ill):
            tell_event(
                "tolaria", "gradient_dropped", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=NOT_FINITE,
                origin=self._source, whose=name,
            )  # fmt: skip
        self._ill = (self._ill - set(names)) | found
