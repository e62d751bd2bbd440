from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_rpc.proto.leyline.v1 import MessagePriority
from esper_servers.tamiyo.risk.events import priority_of
from esper_servers.tamiyo.risk.reading import DEMAND_NAMES

from .observations import Observation

Sums = defaultdict[str, float]
REASON, DEMAND, COUNT = "reason.", "demand.", ".count"
_CRITICAL = MessagePriority.MESSAGE_PRIORITY_CRITICAL


@dataclass(slots=True)
class RunTrace:
    """Running sums over the watched steps of a run: what happened between two moments is their difference.

    So a step costs the same however many commands of its run are observed.
    """

    run_id: str
    epoch: int = 0
    loss: float | None = None
    """The last finite one."""
    latencies: dict[str, float] = field(default_factory=dict)
    sums: Sums = field(default_factory=lambda: defaultdict(float))
    breaker_moves: int | None = None
    """As the last step told it; it begins anew with the controller."""

    def take_in(self, seen: Observation) -> None:
        """Add a step."""
        self.epoch = seen.epoch
        self.sums["steps"] += 1
        self.sums["decision_ms"] += seen.decision_us / 1000
        self._take_in_loss(seen.loss)
        self._take_in_risk(seen)
        for name, milliseconds in seen.latencies.items():
            self.latencies[name] = milliseconds
            self.sums[name] += milliseconds
            self.sums[name + COUNT] += 1
        if self.breaker_moves is not None:
            self.sums["breaker_transitions"] += seen.breaker_moves - self.breaker_moves
        self.breaker_moves = seen.breaker_moves

    def snapshot(self) -> RunTrace:
        """Copy what is known now."""
        return RunTrace(self.run_id, self.epoch, self.loss, self.latencies.copy(), self.sums.copy())

    def since(self, before: Mapping[str, float]) -> Sums:
        """Return the sums of the steps after a moment."""
        return defaultdict(float, {name: total - before.get(name, 0) for name, total in self.sums.items()})

    def _take_in_loss(self, loss: float | None) -> None:
        if loss is None:
            return
        if math.isfinite(loss):
            self.loss = loss
        else:
            self.sums["loss_not_finite"] += 1

    def _take_in_risk(self, seen: Observation) -> None:
        verdict = seen.verdict
        self.sums["risk_score"] += verdict.score
        self.sums[DEMAND + DEMAND_NAMES[verdict.demand]] += 1
        self.sums["criticals"] += priority_of(verdict) == _CRITICAL
        self.sums["held_back"] += verdict.holds
        if verdict.reason:
            self.sums[REASON + verdict.reason] += 1
