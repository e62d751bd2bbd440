from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from esper_rpc import verdict
from esper_rpc.envelope import reasons
from esper_rpc.pause_quota import PauseConfig, PauseQuota
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.verdict import Verdict

from . import lifecycle
from .gates import interface
from .gates.health import why_failed
from .inbox import Queued
from .limits import LocalLimits
from .seed_slot import SeedSlot
from .telemetry.notices import INFO, WARNING, Tell, tell_nobody

UNKNOWN_SEED = "unknown_seed"
DEFAULT_PAUSE_MS = 1000
WINDOW_SECONDS = 60.0


class Pauses:
    """Holds seeds at identity for a while, from the quota of whoever signed; never the loop."""

    def __init__(
        self,
        *,
        limits: LocalLimits,
        clock: Callable[[], float],
        quota: PauseConfig | None = None,
        tell: Tell = tell_nobody,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._quota = PauseQuota(quota or PauseConfig(), clock)
        self._tell = tell
        self._granted: deque[float] = deque()
        self._spending: set[str] = set()

    def hold(self, queued: Queued, seeds: Iterable[SeedSlot]) -> Verdict:
        """Hold the seed that a command names, or without a name all that grow, for as many milliseconds as are granted.

        Every request is told with what it asked for and what it got.
        """
        command, now = queued.command, self._clock()
        targets = _targets(command.target_seed_id, seeds)
        if command.target_seed_id and not targets:
            return verdict.failed(UNKNOWN_SEED)
        wanted = command.execution_deadline_ms or DEFAULT_PAUSE_MS
        granted = 0 if self._is_used_up(now) else self._quota.take(queued.issuer, wanted).units
        self._tell_of_grant(queued, wanted, granted)
        if not granted:
            return verdict.rejected(reasons.LOCAL_LIMIT)
        self._granted.append(now)
        for slot in targets:
            held_until = slot.paused_until if slot.site.paused else now
            slot.site.paused, slot.paused_until = True, max(held_until, now + granted / 1000)
            self._tell("pause", INFO, reason="commanded", seed_id=slot.seed_id, units=granted)
        return verdict.APPLIED

    def release(self, slot: SeedSlot) -> str:
        """Let a seed go on whose pause is over, if it passes again; returns why it is to be culled, else nothing."""
        if not slot.site.paused or self._clock() < slot.paused_until:
            return ""
        slot.site.paused = False
        reason = _why_it_cannot_resume(slot)
        self._tell("resume", WARNING if reason else INFO, reason=reason or "pause_is_over", seed_id=slot.seed_id)
        return reason

    def tick(self) -> None:
        """Tell of quotas that are whole again."""
        whole = [each for each in self._spending if self._quota.remaining(each) >= self._quota.config.units_per_window]
        for principal in whole:
            self._spending.discard(principal)
            self._tell("pause_quota_reset", INFO, reason="window_passed", principal=principal)

    def _tell_of_grant(self, queued: Queued, wanted: int, granted: int) -> None:
        name, level, reason = _told_as(wanted, granted)
        self._spending.add(queued.issuer)
        self._tell(
            name, level, reason=reason, principal=queued.issuer, command_id=queued.command.command_id,
            requested_units=wanted, granted_units=granted, remaining_units=self._quota.remaining(queued.issuer),
        )  # fmt: skip

    def _is_used_up(self, now: float) -> bool:
        while self._granted and self._granted[0] <= now - WINDOW_SECONDS:
            self._granted.popleft()
        return len(self._granted) >= self._limits.pauses_per_minute


def _told_as(wanted: int, granted: int) -> tuple[str, TelemetryLevel.ValueType, str]:
    if not granted:
        return "pause_quota_denied", WARNING, "denied"
    return "pause_quota_granted", INFO, "full" if granted == wanted else "partial"


def _why_it_cannot_resume(slot: SeedSlot) -> str:
    """Look again at what its gates looked at: weights, shape and what it did before."""
    if slot.site.seed is None or slot.stage not in lifecycle.LIVE:
        return ""
    if slot.has_failed() or not slot.has_finite_weights():
        return why_failed(slot)
    return interface.why_it_does_not_fit(slot)


def _targets(wanted: str, seeds: Iterable[SeedSlot]) -> list[SeedSlot]:
    # Without a target all that grow: a fossil is a part of the model.
    return [slot for slot in seeds if slot.seed_id == wanted or (not wanted and slot.stage in lifecycle.LIVE)]
