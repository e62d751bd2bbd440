from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper_rpc.proto.kasmina.v1 import GateEvent

from . import lifecycle
from .gates import system_impact
from .gates.config import GateConfig
from .progress import Progress
from .seed_slot import SeedSlot

LOSS_PATIENCE = "loss_patience"
STAGE_PATIENCE = "stage_patience"


@dataclass(slots=True)
class _Count:
    """Of one grafted seed, in steps in which it was not paused."""

    begun: int
    in_stage: int = 0
    worse: int = 0
    """Those in a row whose loss was worse than before its graft."""
    worse_since: int = 0


class Patience:
    """Says which grafted seed has to go although nobody commands it, so that no mesh is needed to be rid of it.

    A seed that makes the loss worse, and one that stays where it is: its host and what lies below learn nothing there.
    """

    def __init__(self, *, config: GateConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._losses = 0
        self._looks = 0
        self._counts: dict[str, _Count] = {}

    def renew(self, slot: SeedSlot) -> None:
        """Note that a seed has moved, or begun anew where it is."""
        if slot.seed_id in self._counts:
            self._counts[slot.seed_id].in_stage = 0

    def clear(self) -> None:
        """Count anew, after seeds were restored."""
        self._counts.clear()

    def look(self, live: Iterable[SeedSlot]) -> tuple[SeedSlot, GateEvent] | None:
        """Count a step; return the seed that has to go, with what is told of it. One a step at most."""
        grafted = [slot for slot in live if slot.stage in lifecycle.BLENDED]
        if not grafted and not self._counts:
            return None
        self._forget_those_gone(grafted)
        self._looks += 1
        is_known = self._has_new_loss()
        # While it is paused the host stands alone, and the loss says nothing of the seed.
        taking_part = [slot for slot in grafted if not slot.site.paused]
        # Each is counted, also after one that is over its patience.
        is_over = [self._count(slot, is_known=is_known) for slot in taking_part]
        if True not in is_over:
            return None
        return self._stayed_too_long(taking_part) or self._made_worse(taking_part)

    def _forget_those_gone(self, grafted: Sequence[SeedSlot]) -> None:
        known = {slot.seed_id for slot in grafted}
        if self._counts.keys() <= known:
            return
        for seed_id in self._counts.keys() - known:
            del self._counts[seed_id]
        # What the loss was until now may have been their doing.
        for count in self._counts.values():
            count.worse = 0

    def _has_new_loss(self) -> bool:
        before, self._losses = self._losses, self._progress.losses
        return self._losses != before and math.isfinite(self._progress.loss)

    def _count(self, slot: SeedSlot, *, is_known: bool) -> bool:
        """Count a step; return whether the seed has stayed, or the loss has been worse, for too long."""
        count = self._counts.get(slot.seed_id)
        if count is None:
            count = self._counts[slot.seed_id] = _Count(begun=self._looks)
        count.in_stage += 1
        if is_known:
            self._hold_the_loss_against(slot, count)
        config = self._config
        return 0 < config.stage_patience < count.in_stage or 0 < config.loss_patience <= count.worse

    def _hold_the_loss_against(self, slot: SeedSlot, count: _Count) -> None:
        is_worse = not system_impact.keeps_the_loss(slot, self._config, loss=self._progress.loss)
        count.worse = count.worse + 1 if is_worse else 0
        if count.worse == 1:
            count.worse_since = self._looks

    def _stayed_too_long(self, slots: Sequence[SeedSlot]) -> tuple[SeedSlot, GateEvent] | None:
        most = self._config.stage_patience
        for slot in slots:
            if 0 < most < self._counts[slot.seed_id].in_stage:
                return slot, system_impact.out_of_patience(STAGE_PATIENCE, f"no move for {most} steps")
        return None

    def _made_worse(self, slots: Sequence[SeedSlot]) -> tuple[SeedSlot, GateEvent] | None:
        most = self._config.loss_patience
        for slot in slots:
            count = self._counts[slot.seed_id]
            if 0 < most <= count.worse:
                detail = f"{self._progress.loss:g} for {most} steps, before {slot.seed_id} {slot.loss_at_graft:g}"
                return self._blamed(count, slots) or slot, system_impact.out_of_patience(LOSS_PATIENCE, detail)
        return None

    def _blamed(self, count: _Count, slots: Sequence[SeedSlot]) -> SeedSlot | None:
        """The seed that was grafted last before the loss was worse; others may have been good all the time."""
        suspects = [slot for slot in slots if self._counts[slot.seed_id].begun < count.worse_since]
        return max(suspects, key=lambda slot: (slot.grafted_at, slot.depth), default=None)
