from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from esper_rpc.breaker import CircuitBreaker
from esper_servers.policy.norms import Experience
from esper_servers.policy.norms_store import NormsStore
from esper_servers.policy.registries import Registries

from .run_state import Runs

log = structlog.get_logger(__name__)


class LastingState:
    """What runs leave to those after them, also across a restart: norms, and the numbers of names."""

    def __init__(self, directory: Path, *, breaker: CircuitBreaker | None = None) -> None:
        self.norms = NormsStore.load(directory)
        self.registries = Registries.load(directory)
        self.runs = Runs(norms=self.norms, registries=self.registries)
        self._breaker = breaker or CircuitBreaker()
        self._is_writable = True

    async def save(self) -> None:
        """Write what has changed, on a thread of its own; without room on the disk the next time."""
        open_runs = [run.experience for run in self.runs.all() if run.steps]
        if self._breaker.allow():
            await asyncio.to_thread(self._write, self.norms.parts(open_runs))

    def _write(self, parts: Sequence[Experience]) -> None:
        try:
            self.norms.save(parts)
            self.registries.save()
        except OSError as error:
            self._breaker.record_failure()
            if self._is_writable:
                log.warning("state_not_saved", problem=error.strerror, priority="HIGH")
            self._is_writable = False
        else:
            self._breaker.record_success()
            self._is_writable = True
