from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog
import torch
from torch import Tensor

from .host_sample import HostSample
from .spans import MemoryMap

log = structlog.get_logger(__name__)

LOOK_EACH = 64
"""Steps from one look at which parameters the host has to the next; where they lie is looked at in each."""


class HostWatch:
    """Where the parameters of a host lie, and how large its gradient is at the end of a backward pass."""

    def __init__(self, parameters: Callable[[], Iterable[Tensor]], stopwatch: Callable[[], float]) -> None:
        self._parameters = parameters
        self._stopwatch = stopwatch
        self.map = MemoryMap(())
        """As it was at the last look."""
        self._sample = HostSample(())
        self._steps = 0
        self._norm: Tensor | None = None
        self._is_queued = False
        self._spent = 0.0

    def look(self) -> None:
        """See where they lie; once in a step."""
        if self._steps % LOOK_EACH == 0 or not self.map.is_current:
            learning = [parameter for parameter in self._parameters() if parameter.requires_grad]
            self.map, self._sample = MemoryMap(learning), HostSample(learning)
        self._steps += 1

    def look_anew(self) -> None:
        """Have the next look find out which parameters there are."""
        self._steps = 0

    def on_backward(self) -> None:
        """Take the norm when the backward pass ends in which this is called: the user may zero gradients after it."""
        if self._is_queued:
            return
        try:
            torch.autograd.Variable._execution_engine.queue_callback(self._measure)
            self._is_queued = True
        except Exception as error:  # noqa: BLE001  # It would end the user's backward pass.
            log.debug("host_norm_not_measured", error=str(error))

    def take_norm(self) -> float | None:
        """Return the norm of the last backward pass since the last call, as it was there: scaled by a loss scaler."""
        # A backward pass that raised never came to its end.
        self._is_queued = False
        norm, self._norm = self._norm, None
        return None if norm is None else float(norm)

    def take_spent(self) -> float:
        """Return the seconds within backward passes since the last call."""
        spent, self._spent = self._spent, 0.0
        return spent

    def _measure(self) -> None:
        begun, self._is_queued = self._stopwatch(), False
        try:
            with torch.no_grad():
                self._norm = self._sample.norm()
        except Exception as error:  # noqa: BLE001  # As above.
            log.debug("host_norm_not_measured", error=str(error))
        self._spent += self._stopwatch() - begun
