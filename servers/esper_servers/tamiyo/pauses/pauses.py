from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import structlog

from esper_rpc.errors import ResourceExhausted
from esper_rpc.journal import Journal
from esper_rpc.pause_quota import PauseConfig, PauseQuota
from esper_rpc.proto.tamiyo.v1 import PauseGrant, RequestPauseResponse
from esper_rpc.telemetry.metrics import observe_pause, tell_pause_quota

from .trail import PauseTrail

log = structlog.get_logger(__name__)

FULL, PARTIAL, DENIED = "full", "partial", "denied"


class Pauses:
    """Grants pauses from the quota of each principal. A grant is told only when it stands in the audit trail.

    What the trail holds of the present window counts from the start, so that a restart gives nobody a second quota.
    """

    def __init__(self, quota: PauseQuota, trail: PauseTrail, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._quota = quota
        self._trail = trail
        self._clock_ns = clock_ns
        quota.restore(self._in_the_window())

    @classmethod
    def of(cls, journal: Journal, config: PauseConfig) -> Pauses:
        """Keep the trail in a journal, which is read for what counts already."""
        return cls(PauseQuota(config), PauseTrail(journal))

    async def request(self, principal: str, run_id: str, units: int, reason: str) -> RequestPauseResponse:
        """Grant all, some or none of the units; raises ResourceExhausted when the trail cannot be written."""
        spending = self._quota.take(principal, units)
        granted, remaining = spending.units, self._quota.remaining(principal)
        grant = PauseGrant(
            principal=principal, run_id=run_id, requested_units=units, granted_units=granted, reason=reason
        )
        grant.granted_at.FromNanoseconds(self._clock_ns())
        if not await asyncio.to_thread(self._trail.keep, grant):
            self._quota.give_back(spending)
            raise ResourceExhausted("The audit trail of pauses cannot be written.", reason="STORAGE")
        _report(grant)
        return RequestPauseResponse(granted_units=granted, remaining_units=remaining)

    async def page(self, size: int, token: str) -> tuple[list[PauseGrant], str]:
        """Return lines of the audit trail, oldest first, and the token of the next page; raises InvalidRequest."""
        return await asyncio.to_thread(self._trail.page, size, token)

    async def tell_remaining(self) -> None:
        """Put into the metrics what is left: it grows while nobody asks."""
        tell_pause_quota(self._quota.least_remaining())

    def _in_the_window(self) -> Iterator[tuple[str, int, float]]:
        now, window = self._clock_ns(), self._quota.config.window_seconds
        for grant in self._trail.newest_first():
            # A wall clock that was set back leaves lines in the future; they count as if they were of now.
            age = max(0.0, (now - grant.granted_at.ToNanoseconds()) / 1e9)
            if age >= window:
                return
            yield grant.principal, grant.granted_units, age


def _report(grant: PauseGrant) -> None:
    result = DENIED if not grant.granted_units else FULL if grant.granted_units == grant.requested_units else PARTIAL
    observe_pause(result)
    log.info(
        "pause_quota_denied" if result == DENIED else "pause_quota_granted",
        principal=grant.principal,
        run_id=grant.run_id,
        requested_units=grant.requested_units,
        granted_units=grant.granted_units,
    )
