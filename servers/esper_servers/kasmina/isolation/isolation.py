from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import structlog
from torch import Tensor, nn

from esper_rpc.breaker import CLOSED, HALF_OPEN, OPEN, BreakerConfig
from esper_rpc.proto.leyline.v1 import CircuitState, MetricPoint, SeedOperation
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.breakers import TellingBreaker
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.kasmina.site import Site
from esper_servers.kasmina.telemetry.notices import CRITICAL, WARNING, Tell, tell_nobody

from .host_watch import HostWatch
from .seed_watch import SeedWatch

log = structlog.get_logger(__name__)

BREAKER = "gradient_isolation"
BREAKER_CONFIG = BreakerConfig(failures=3, cool_down_seconds=30.0)
ISOLATION_BREAKER_OPEN = "isolation_breaker_open"
ISOLATION_VIOLATIONS = "isolation_violations"
VIOLATIONS = 3
"""Of one seed, until it is culled."""
FORGOTTEN_SECONDS = 300.0
"""Without a violation, until those before count no more towards the breaker."""
COLLECTED = frozenset({lifecycle.TRAINING, lifecycle.BLENDING})
_OUTWARD = frozenset({SeedOperation.SEED_OPERATION_CULL, SeedOperation.SEED_OPERATION_CANCEL})


@dataclass
class _Record:
    """What is known of a seed for as long as its module stands at its site."""

    site: Site
    module: nn.Module
    watch: SeedWatch | None = None
    violations: int = 0
    dot: float | None = None
    """In the last step; None where nothing was measured in it."""
    problem: str = "not measured yet"

    def hook(self, on_backward: Callable[[], object]) -> SeedWatch:
        if self.watch is None:
            self.watch = SeedWatch(self.site.own_parameters, on_backward)
            self.site.around_backward = self.watch.own_backward
            # What has nothing that learns has nothing to measure.
            self.problem = self.problem if self.site.own_parameters else ""
        return self.watch

    def unhook(self) -> None:
        if self.watch is None:
            return
        self.watch.end()
        if self.site.seed is self.module:
            self.site.around_backward = nullcontext
        self.watch = None


class Isolation:
    """Sees whether gradients of the host and of its seeds overlap, and keeps seeds as they are where that repeats.

    For use at the safe point; in between only hooks of its own work. Nothing here raises.
    """

    def __init__(
        self,
        host_parameters: Callable[[], Iterable[Tensor]],
        *,
        clock: Callable[[], float] = time.monotonic,
        tell: Tell = tell_nobody,
        on_shared: Callable[[str, Iterable[Tensor]], object] = lambda _seed_id, _parameters: None,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`on_shared` gets parameters of a seed that lie in the host's memory although no gradients overlap there."""
        self._host = HostWatch(host_parameters, stopwatch)
        self._clock = clock
        self._tell = tell
        self._on_shared = on_shared
        self._stopwatch = stopwatch
        self._records: dict[str, _Record] = {}
        self.breaker = TellingBreaker(BREAKER, config=BREAKER_CONFIG, clock=clock, tell=tell)
        self._last_violation = -math.inf
        self._violations = 0
        self._host_norm: float | None = None
        self._shown: list[MetricPoint] = []
        self.last_ms = 0.0
        """What measuring took in the last step, hooks that found nothing aside."""

    def admits(self, operation: SeedOperation.ValueType) -> bool:
        """Whether an operation on a seed may be carried out: not while the breaker is open, and half-open one a step.

        What takes a seed out always may.
        """
        return operation in _OUTWARD or self.breaker.allow()

    def violations_of(self, seed_id: str) -> int:
        """Return in how many steps the gradient of a seed overlapped with the host's, since it was planted."""
        record = self._records.get(seed_id)
        return record.violations if record is not None else 0

    def recall(self, slot: SeedSlot, violations: int) -> None:
        """Go on counting from so many violations, those of a seed that was restored; it is hooked anew."""
        before = self._records.get(slot.seed_id)
        self.release(slot.seed_id)
        record = self._record_of(slot)
        if record is not None:
            record.violations = violations
            # A gate that is asked before the next step goes by what was measured in the last one.
            record.problem = before.problem if before is not None else record.problem

    def is_healthy(self, seed_id: str) -> bool:
        """Whether the seed was measured in the last step that trained it."""
        record = self._records.get(seed_id)
        return record is not None and not record.problem

    def is_repeated(self, seed_id: str) -> bool:
        """Whether a seed has violated so often that it is to be culled."""
        return self.violations_of(seed_id) >= VIOLATIONS

    def follow(self, slot: SeedSlot) -> None:
        """Put hooks on a seed that has moved to where it trains, and take them off one that has left."""
        record = self._record_of(slot)
        if record is not None:
            self._guarded(slot, record, self._hook)

    def measure(self, live: Iterable[SeedSlot]) -> None:
        """Judge the step that ends, and hook the seeds that learn in the next; call it before their optimizers step."""
        begun, before = self._stopwatch(), self.breaker.state
        slots = {slot.seed_id: slot for slot in live}
        for gone in self._records.keys() - slots.keys():
            self.release(gone)
        if any(slot.stage in COLLECTED for slot in slots.values()):
            self._host.look()
        self._violations, self._host_norm = 0, self._host.take_norm()
        for slot in slots.values():
            self._end_step(slot)
        self._settle()
        self._shown = list(self._of_all(before))
        self.last_ms = (self._stopwatch() - begun + self._host.take_spent()) * 1e3

    def release(self, seed_id: str) -> None:
        """Forget a seed that was taken out."""
        record = self._records.pop(seed_id, None)
        if record is not None:
            record.unhook()
            # It may have become a fossil, and so a part of the host.
            self._host.look_anew()

    def metrics(self) -> list[MetricPoint]:
        """Return what the last step has shown of all seeds; nothing where none was measured and all is well."""
        return self._shown

    def metrics_of(self, slot: SeedSlot) -> Iterator[MetricPoint]:
        """Yield what the last step has shown of a seed; ask when its optimizer has stepped."""
        record = self._records.get(slot.seed_id)
        if record is None:
            return
        yield _of_seed(slot, "kasmina.seed.isolation_violations", record.violations)
        if record.dot is None:
            return
        found = (("dot", record.dot), ("host_norm", self._host_norm), ("seed_norm", slot.gradient_norm))
        for name, value in found:
            if value is not None and math.isfinite(value):
                yield _of_seed(slot, f"isolation.{name}", value)

    def _end_step(self, slot: SeedSlot) -> None:
        record = self._record_of(slot)
        if record is not None:
            self._guarded(slot, record, self._judge)
            self._guarded(slot, record, self._hook)

    @staticmethod
    def _guarded(slot: SeedSlot, record: _Record, work: Callable[[SeedSlot, _Record], None]) -> None:
        try:
            work(slot, record)
        except Exception as error:  # noqa: BLE001  # The parameters of foreign modules may be of any kind.
            record.problem = f"{type(error).__name__}: {error}"
            log.warning("isolation_not_measured", seed_id=slot.seed_id, problem=record.problem)

    def _record_of(self, slot: SeedSlot) -> _Record | None:
        module, record = slot.site.seed, self._records.get(slot.seed_id)
        if record is not None and record.module is not module:
            self.release(slot.seed_id)
            record = None
        if record is None and module is not None:
            record = self._records[slot.seed_id] = _Record(slot.site, module)
        return record

    def _judge(self, slot: SeedSlot, record: _Record) -> None:
        record.dot = None
        found = record.watch.take() if record.watch is not None else None
        if found is None or record.watch is None:
            return
        record.dot, record.problem = found.dot, found.problem
        if not math.isfinite(found.dot):
            # An infinite one may be that of a loss scale, which is taken back.
            record.problem = record.problem or "gradients that are not finite"
        elif found.dot:
            self._count(slot, record)
        elif record.watch.covered:
            self._on_shared(slot.seed_id, record.watch.covered)

    def _hook(self, slot: SeedSlot, record: _Record) -> None:
        if slot.stage not in COLLECTED:
            record.unhook()
            return
        watch = record.hook(self._host.on_backward)
        watch.look(self._host.map)
        if watch.covered:
            # The seed's own optimizer would write into the host.
            slot.clear_gradients()

    def _count(self, slot: SeedSlot, record: _Record) -> None:
        record.violations += 1
        self._violations += 1
        self._last_violation = self._clock()
        was_open = self.breaker.state == OPEN
        self.breaker.record_failure()
        if was_open:
            return
        is_open = self.breaker.state == OPEN
        self._tell(
            ISOLATION_VIOLATIONS, CRITICAL if is_open else WARNING, reason="gradients_overlap", seed_id=slot.seed_id,
            dot=record.dot or 0.0, count=record.violations,
        )  # fmt: skip

    def _settle(self) -> None:
        """Let a step without a violation count for the breaker."""
        if self._violations:
            return
        is_half_open = self.breaker.state == HALF_OPEN
        is_long_ago = self._clock() - self._last_violation >= FORGOTTEN_SECONDS
        if is_half_open or (self.breaker.consecutive_failures and is_long_ago):
            self.breaker.record_success()

    def _of_all(self, before: CircuitState.ValueType) -> Iterator[MetricPoint]:
        # Half-open, it may have closed in this step, which has to be shown too.
        is_well = before == self.breaker.state == CLOSED
        if is_well and all(record.dot is None for record in self._records.values()):
            return
        yield MetricPoint(name="kasmina.isolation.violations", value=float(self._violations))
        yield MetricPoint(name="kasmina.isolation.latency_ms", value=self.last_ms)
        yield self.breaker.metric()


def _of_seed(slot: SeedSlot, name: str, value: float) -> MetricPoint:
    return MetricPoint(name=name, value=value, attributes={"seed_id": slot.seed_id})
