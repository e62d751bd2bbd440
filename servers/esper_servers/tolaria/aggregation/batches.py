from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from esper_rpc.errors import InvalidRequest

from . import conflicts
from .aggregator import Aggregated, AggregationConfig, check
from .conflict_rate import ConflictRate
from .conflicts import Gradients
from .dropped import Dropped

MICROBATCH = "microbatch"


@dataclass(slots=True)
class _Step:
    """What has come of the batches of a step."""

    total: list[Tensor | None] = field(default_factory=list)
    samples: int = 0
    batches: int = 0
    compared: int = 0
    opposed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


class BatchAggregator:
    """Makes the gradient of a step of those of its microbatches, and knows how often they conflict.

    A batch is compared with the sum of those before it, so earlier ones have priority: hand them over in an order that
    means nothing. No more than two gradients are held at a time.
    """

    def __init__(self, config: AggregationConfig | None = None) -> None:
        self.config = config or AggregationConfig()
        self.rate = ConflictRate(MICROBATCH)
        self._dropped = Dropped(MICROBATCH)
        self._step = _Step()

    def add(self, gradients: Gradients, *, samples: int) -> None:
        """Add the gradients of a loss that is a mean over so many samples. They are taken over and changed.

        Raises:
            InvalidRequest: When they do not belong to the parameters of the batches before, are sparse, or there are
                no samples.
        """
        step, own = self._step, list(gradients)
        if samples < 1:
            raise InvalidRequest("A microbatch has one sample at least.")
        total = step.total or [None] * len(own)
        check(own, total)
        step.total = total
        name, step.batches = str(step.batches), step.batches + 1
        [angle], _ = conflicts.angles([own], total, shared=len(own))
        if not angle.is_finite:
            step.dropped.append(name)
            return
        step.compared += any(each is not None for each in total)
        if angle.cosine < self.config.threshold:
            step.opposed.append(name)
            if not conflicts.settle(self.config.conflict, own, total, angle, shared=len(own)):
                return
        conflicts.add(total, own, samples)
        step.samples += samples

    def finish(self) -> Aggregated:
        """Return the gradient of the step, and begin the next. Batches are named by their number, from 0.

        Raises:
            InvalidRequest: When no batch was added.
        """
        step, self._step = self._step, _Step()
        if not step.batches:
            raise InvalidRequest("A step has one microbatch at least.")
        for each in step.total:
            if each is not None:
                each.div_(step.samples)
        norm = conflicts.clip(step.total, self.config.max_norm)
        self.rate.note(len(step.opposed), step.compared)
        self._dropped.note([str(index) for index in range(step.batches)], step.dropped)
        return Aggregated(step.total, tuple(step.opposed), tuple(step.dropped), norm)
