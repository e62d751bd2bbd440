from __future__ import annotations

from dataclasses import dataclass

from .isolation.isolation import ISOLATION_VIOLATIONS, Isolation
from .ownership import PARAMETER_VIOLATION, Ownership
from .seed_slot import SeedSlot


@dataclass(frozen=True, slots=True)
class Boundary:
    """What seeds keep to: each to parameters of its own, and their gradients apart from the host's."""

    ownership: Ownership
    isolation: Isolation

    def violations_of(self, seed_id: str) -> int:
        """Return how often a seed wrote, or would have written, to what is not its own since it was planted."""
        return self.ownership.violations_of(seed_id) + self.isolation.violations_of(seed_id)

    def why_it_must_go(self, slot: SeedSlot) -> str:
        """Look at what the seed would have written to since the last call; return why it is to be culled, if it is."""
        foreign = slot.site.take_foreign()
        if foreign:
            self.ownership.validate(slot.seed_id, foreign)
        if self.ownership.is_repeated(slot.seed_id):
            return PARAMETER_VIOLATION
        return ISOLATION_VIOLATIONS if self.isolation.is_repeated(slot.seed_id) else ""

    def release(self, seed_id: str) -> None:
        """Forget a seed that was taken out."""
        self.ownership.release(seed_id)
        self.isolation.release(seed_id)
