from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from esper_rpc.errors import DataLoss, EsperError, NotFound
from esper_rpc.proto.urza.v1 import Blueprint

log = structlog.get_logger(__name__)

UNKNOWN_BLUEPRINT = "unknown_blueprint"
KERNEL_DAMAGED = "checksum_mismatch"
UNAVAILABLE = "library_unavailable"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A blueprint with the weights of its kernel, if it has any."""

    blueprint: Blueprint
    weights: bytes | None = None


Fetch = Callable[[str], Awaitable[Kernel]]
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class KernelLibrary:
    """Holds kernels fetched in the background; the training thread never waits for one."""

    def __init__(self, fetch: Fetch, spawn: Spawn) -> None:
        self._fetch = fetch
        self._spawn = spawn
        self._lock = threading.Lock()
        self._kernels: dict[str, Kernel] = {}
        self._failures: dict[str, str] = {}
        self._pending: set[str] = set()

    def add(self, kernel: Kernel) -> None:
        """Keep a kernel."""
        with self._lock:
            self._kernels[kernel.blueprint.descriptor.blueprint_id] = kernel

    def request(self, blueprint_id: str) -> None:
        """Begin to fetch a kernel unless it is here or on its way."""
        with self._lock:
            if blueprint_id in self._kernels or blueprint_id in self._pending:
                return
            self._pending.add(blueprint_id)
            self._failures.pop(blueprint_id, None)
        self._spawn(self._load(blueprint_id))

    def get(self, blueprint_id: str) -> Kernel | str | None:
        """Return the kernel, or the reason why there is none, or None while it is on its way."""
        with self._lock:
            return self._kernels.get(blueprint_id) or self._failures.get(blueprint_id)

    async def _load(self, blueprint_id: str) -> None:
        reason = ""
        try:
            self.add(await self._fetch(blueprint_id))
        except NotFound:
            reason = UNKNOWN_BLUEPRINT
        except DataLoss:
            reason = KERNEL_DAMAGED
        except EsperError as error:
            reason = UNAVAILABLE
            log.warning("kernel_fetch_failed", blueprint_id=blueprint_id, error=str(error))
        with self._lock:
            self._pending.discard(blueprint_id)
            if reason:
                self._failures[blueprint_id] = reason
