from __future__ import annotations

from collections.abc import Callable, Iterable

from esper_servers.blueprints.out_of_memory import describe

from . import lifecycle
from .boundary import Boundary
from .gatekeeper import Gatekeeper
from .gates.health import why_failed
from .gates.report import PASSED
from .pausing import Pauses
from .seed_slot import SeedSlot
from .surgery import Surgeon
from .telemetry.notices import INFO, Tell

RECOVERY = "recovery"


class Upkeep:
    """What the end of a step does to seeds without a command: it trains them, lets them go on, or takes them out."""

    def __init__(
        self,
        *,
        surgeon: Surgeon,
        gatekeeper: Gatekeeper,
        boundary: Boundary,
        pauses: Pauses,
        clock: Callable[[], float],
        tell: Tell,
    ) -> None:
        self._surgeon = surgeon
        self._gatekeeper = gatekeeper
        self._boundary = boundary
        self._pauses = pauses
        self._clock = clock
        self._tell = tell
        self._ended_at = clock()

    def resume(self) -> None:
        """Let time count from now on, after seeds were restored from another time."""
        self._ended_at = self._clock()

    def finalize(self, slots: Iterable[SeedSlot]) -> None:
        """End a step for seeds: their optimizers, their pauses, and the moves that need no command."""
        now = self._clock()
        passed, self._ended_at = now - self._ended_at, now
        for slot in slots:
            self._finalize(slot, passed)
        self._surgeon.lose_patience()

    def _finalize(self, slot: SeedSlot, seconds: float) -> None:
        slot.steps_in_stage += 1
        slot.note_blend()
        held_back = self._pauses.release(slot)
        self._step_optimizer(slot)
        reason = held_back or self._why_it_must_go(slot)
        if slot.stage in lifecycle.LIVE and reason:
            self._surgeon.fall_back(slot, reason)
        else:
            self._recover(slot, seconds)

    def _step_optimizer(self, slot: SeedSlot) -> None:
        try:
            slot.step_optimizer()
        except Exception as error:  # noqa: BLE001  # A seed is foreign code, and its parameters may be of any kind.
            # Its first step allocates the optimizer's state; what is short there must not end the user's step.
            slot.site.failure = describe(error)

    def _why_it_must_go(self, slot: SeedSlot) -> str:
        reason = self._boundary.why_it_must_go(slot)
        return why_failed(slot) if not reason and slot.has_failed() else reason

    def _recover(self, slot: SeedSlot, seconds: float) -> None:
        """Culled, embargoed, reset, dormant: the moves that need no command, one a step at most."""
        if slot.stage == lifecycle.CULLED:
            self._surgeon.move(slot, lifecycle.EMBARGOED, RECOVERY)
            self._tell("embargo_start", INFO, reason=RECOVERY, seed_id=slot.seed_id, seconds=slot.embargo_left)
        elif slot.stage == lifecycle.EMBARGOED:
            self._wait(slot, seconds)
        elif slot.stage == lifecycle.RESETTING and self._is_reset(slot):
            self._surgeon.move(slot, lifecycle.DORMANT, RECOVERY)

    def _wait(self, slot: SeedSlot, seconds: float) -> None:
        slot.embargo_left -= seconds
        if slot.embargo_left <= 0:
            slot.embargo_left = 0.0
            self._surgeon.move(slot, lifecycle.RESETTING, RECOVERY)
            self._tell("embargo_end", INFO, reason=RECOVERY, seed_id=slot.seed_id)

    def _is_reset(self, slot: SeedSlot) -> bool:
        slot.uproot()
        slot.reset()
        self._boundary.release(slot.seed_id)
        gate = self._gatekeeper.judge(slot, lifecycle.DORMANT)
        return gate is None or gate.result == PASSED
