from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch

from esper_rpc.breaker import OPEN, BreakerConfig
from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import MetricPoint
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY

from .breakers import TellingBreaker
from .host_memory import used_share
from .telemetry.notices import ERROR, INFO, WARNING, Tell, tell_nobody

BREAKER = "memory_bounds"
BREAKER_CONFIG = BreakerConfig(failures=5, cool_down_seconds=60.0)
EMERGENCY = "memory_emergency"

MemoryReader = Callable[[], float | None]
"""Returns the share of the memory that is in use, None where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """When memory is short, and how often it is looked at and tidied up."""

    warn_share: Annotated[float, Range(0, 1)] = 0.85
    emergency_share: Annotated[float, Range(0, 1)] = 0.9
    look_seconds: Annotated[float, Range(0.1, 3600)] = 1.0
    collect_epochs: Annotated[int, Range(1, 1_000_000)] = 100
    """Epochs from one garbage collection to the next."""

    def __post_init__(self) -> None:
        validate(self)
        if self.warn_share > self.emergency_share:
            raise ConfigError(
                f"warn_share = {self.warn_share:g} is out of range;"
                f" allowed is 0 to emergency_share = {self.emergency_share:g}."
            )


class MemoryGovernor:
    """Watches how full the memory is, frees what can be had again when it is short, and stops planting meanwhile.

    For use at the safe point.
    """

    def __init__(
        self,
        *,
        config: MemoryConfig,
        read: MemoryReader,
        clean_up: Callable[[], int],
        expire: Callable[[], int],
        clock: Callable[[], float],
        tell: Tell = tell_nobody,
    ) -> None:
        """`clean_up` lets go of what can be had again, `expire` of what is out of date; both return how many things."""
        self._config = config
        self._read = read
        self._clean_up = clean_up
        self._expire = expire
        self._clock = clock
        self._tell = tell
        self._next_look = clock()
        self._was_short = self._was_emergency = False
        self._share: float | None = None
        self.breaker = TellingBreaker(BREAKER, config=BREAKER_CONFIG, clock=clock, tell=tell)
        self._ran_out_at = -math.inf

    def look(self) -> bool:
        """Look at the memory, once in a while, and act on it; returns whether it was time."""
        now = self._clock()
        if now < self._next_look:
            return False
        self._next_look = now + self._config.look_seconds
        self._share = self._read()
        if self._share is not None:
            self._judge(self._share)
        return True

    def admits(self) -> bool:
        """Whether a seed may be planted. Half-open admits: the next look is what decides."""
        return self.breaker.state != OPEN

    def ran_out(self) -> None:
        """Note that an allocation failed."""
        self._ran_out_at = self._clock()
        self.breaker.record_failure()
        self.clean_up(OUT_OF_MEMORY)

    def end_epoch(self, epoch: int) -> None:
        """Let go of what is out of date, and of all garbage each so many epochs."""
        expired = self._expire()
        if epoch and epoch % self._config.collect_epochs == 0:
            self._tell("epoch_gc", INFO, reason="epochs_passed", epoch=epoch, expired=expired, collected=_collect())

    def clean_up(self, reason: str) -> int:
        """Let go of all that can be had again; returns how many things that were."""
        freed = self._clean_up()
        _collect()
        self._tell("emergency_cleanup", ERROR, reason=reason, freed=freed, share=self._share or 0.0)
        return freed

    def metrics(self) -> Iterator[MetricPoint]:
        """Yield what is known of the memory and the breaker."""
        if self._share is not None:
            yield MetricPoint(name="kasmina.memory.share", value=self._share)
        yield self.breaker.metric()

    def _judge(self, share: float) -> None:
        is_short, is_emergency = share >= self._config.warn_share, share >= self._config.emergency_share
        if is_emergency:
            self.breaker.record_failure()
            if not self._was_emergency:
                self.clean_up(EMERGENCY)
        elif self.admits() and self._clock() - self._ran_out_at >= BREAKER_CONFIG.cool_down_seconds:
            self.breaker.record_success()
        if is_short and not self._was_short:
            self._tell("memory_pressure", WARNING, reason="memory_short", share=share)
        # It counts as over when it is no longer short, lest a share at the edge empty the caches again and again.
        self._was_emergency = is_emergency or (self._was_emergency and is_short)
        self._was_short = is_short


def reader_for(device: torch.device) -> MemoryReader:
    """Return who reads the memory that a model on this device lives in."""
    return (lambda: _cuda_share(device)) if device.type == "cuda" else used_share


def _cuda_share(device: torch.device) -> float | None:
    try:
        free, total = torch.cuda.mem_get_info(device)
        # What torch keeps for later is free to it.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except RuntimeError:
        return None
    return (total - free - idle) / total


def _collect() -> int:
    collected = gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # Untyped in torch.
        torch.cuda.empty_cache()
    return collected
