from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand

from . import lifecycle, verdict
from .limits import LocalLimits
from .seed_slot import SeedSlot
from .verdict import Verdict

UNKNOWN_SEED = "unknown_seed"
DEFAULT_PAUSE_MS = 1000
WINDOW_SECONDS = 60.0


class Pauses:
    """Holds seeds at identity for a while; never the loop."""

    def __init__(self, *, limits: LocalLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._granted: deque[float] = deque()

    def hold(self, command: AdaptationCommand, seeds: Iterable[SeedSlot]) -> Verdict:
        """Hold the seed that a command names, or without a name all that grow."""
        now = self._clock()
        if self._is_used_up(now):
            return verdict.rejected(reasons.LOCAL_LIMIT)
        targets = _targets(command.target_seed_id, seeds)
        if command.target_seed_id and not targets:
            return verdict.failed(UNKNOWN_SEED)
        self._granted.append(now)
        # A pause unit is one millisecond; the command's deadline says how many.
        units = min(command.execution_deadline_ms or DEFAULT_PAUSE_MS, self._limits.max_pause_ms)
        for slot in targets:
            slot.site.paused, slot.paused_until = True, now + units / 1000
        return verdict.APPLIED

    def release(self, slot: SeedSlot) -> None:
        """Let a seed go on whose pause is over."""
        if slot.site.paused and self._clock() >= slot.paused_until:
            slot.site.paused = False

    def _is_used_up(self, now: float) -> bool:
        while self._granted and self._granted[0] <= now - WINDOW_SECONDS:
            self._granted.popleft()
        return len(self._granted) >= self._limits.pauses_per_minute


def _targets(wanted: str, seeds: Iterable[SeedSlot]) -> list[SeedSlot]:
    # Without a target all that grow: a fossil is a part of the model.
    return [slot for slot in seeds if slot.seed_id == wanted or (not wanted and slot.stage in lifecycle.LIVE)]
