from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import lifecycle
from .seed_slot import SeedSlot


class LiveSeeds:
    """Which seeds stand in the forward pass or learn, counted as they move, so that nobody has to look at all."""

    def __init__(self) -> None:
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def note(self, slot: SeedSlot) -> None:
        """Note the stage that a seed is in now."""
        if slot.stage in lifecycle.LIVE:
            self._ids.add(slot.seed_id)
        else:
            self._ids.discard(slot.seed_id)

    def recount(self, slots: Iterable[SeedSlot]) -> None:
        """Count anew, after seeds were restored."""
        self._ids = {slot.seed_id for slot in slots if slot.stage in lifecycle.LIVE}
