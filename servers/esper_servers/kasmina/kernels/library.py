from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import structlog

from esper_rpc.breaker import BreakerConfig
from esper_rpc.config import Range, validate
from esper_rpc.errors import DataLoss, NotFound
from esper_rpc.proto.leyline.v1 import MetricPoint
from esper_rpc.proto.urza.v1 import Blueprint
from esper_servers.kasmina.breakers import TellingBreaker
from esper_servers.kasmina.telemetry.notices import Tell, tell_nobody

from .latencies import Latencies
from .timed_lru import TimedLru

log = structlog.get_logger(__name__)

UNKNOWN_BLUEPRINT = "unknown_blueprint"
KERNEL_DAMAGED = "checksum_mismatch"
UNAVAILABLE = "library_unavailable"
BREAKER = "kernel_loading"
BREAKER_CONFIG = BreakerConfig(failures=10, cool_down_seconds=30.0)
# A digest takes half a millisecond per MiB; the loop that fetches also carries the steps.
DIGESTED_AT_ONCE = 256 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """How many kernels are kept, for how long, and how many are fetched at once."""

    entries: Annotated[int, Range(1, 1_000_000)] = 1_000
    megabytes: Annotated[int, Range(100, 1_000_000)] = 512
    """MiB; a single kernel has 100 at most."""
    ttl_seconds: Annotated[float, Range(1, 604_800)] = 3_600.0
    concurrent_fetches: Annotated[int, Range(1, 64)] = 8

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A blueprint with the weights of its kernel, if it has any."""

    blueprint: Blueprint
    weights: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes of a cache."""
        return self.blueprint.ByteSize() + len(self.weights or b"")

    def is_whole(self) -> bool:
        """Whether the weights are those that the manifest names."""
        wanted = self.blueprint.manifest.weights_sha256
        return not wanted or hmac.compare_digest(hashlib.sha256(self.weights or b"").digest(), wanted)


Fetch = Callable[[str], Awaitable[Kernel]]
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class KernelLibrary:
    """Holds kernels fetched in the background; the training thread never waits for one. Safe to use from any thread."""

    def __init__(
        self,
        fetch: Fetch,
        spawn: Spawn,
        *,
        config: KernelConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or KernelConfig()
        self._fetch = fetch
        self._spawn = spawn
        self._clock = clock
        self._lock = threading.Lock()
        self._kernels: TimedLru[Kernel] = TimedLru(
            entries=self.config.entries,
            size_bytes=self.config.megabytes * 2**20,
            ttl_seconds=self.config.ttl_seconds,
            clock=clock,
        )
        self._failures: TimedLru[str] = TimedLru(
            entries=self.config.entries, ttl_seconds=self.config.ttl_seconds, clock=clock
        )
        self._pending: set[str] = set()
        self._gate = asyncio.Semaphore(self.config.concurrent_fetches)
        self._latencies = Latencies("kasmina.kernel.fetch_latency_ms")
        self._requests = self._hits = 0
        self._tell: Tell = tell_nobody
        self.breaker = TellingBreaker(
            BREAKER,
            config=BREAKER_CONFIG,
            clock=clock,
            tell=lambda *what, **details: self._tell(*what, **details),  # noqa: PLW0108  # `report_to` comes later.
        )

    def report_to(self, tell: Tell) -> None:
        """Have somebody told what happens from here on."""
        self._tell = tell

    def add(self, kernel: Kernel) -> None:
        """Keep a kernel from now on."""
        with self._lock:
            self._kernels.put(kernel.blueprint.descriptor.blueprint_id, kernel, kernel.size_bytes)

    def request(self, blueprint_id: str) -> None:
        """Begin to fetch a kernel unless it is here or on its way; what failed before is tried again."""
        with self._lock:
            self._failures.remove(blueprint_id)
            is_here = self._kernels.get(blueprint_id) is not None
            self._requests, self._hits = self._requests + 1, self._hits + is_here
            begins = not is_here and self._begin(blueprint_id)
        if begins:
            self._spawn(self._load(blueprint_id))

    def get(self, blueprint_id: str) -> Kernel | str | None:
        """Return the kernel, or the reason why there is none, or None while it is on its way.

        One that was here and has expired, or made room, since it was requested is fetched again.
        """
        with self._lock:
            found = self._kernels.get(blueprint_id) or self._failures.get(blueprint_id)
            begins = found is None and self._begin(blueprint_id)
        if begins:
            self._spawn(self._load(blueprint_id))
        return found

    def purge(self) -> int:
        """Forget what has expired; returns how many kernels that were."""
        with self._lock:
            self._failures.purge()
            return self._kernels.purge()

    def clear(self) -> int:
        """Forget every kernel; returns how many that were."""
        with self._lock:
            self._failures.clear()
            return self._kernels.clear()

    def metrics(self) -> Iterator[MetricPoint]:
        """Yield what is known of cache, fetches and breaker."""
        with self._lock:
            requests, hits, evictions = self._requests, self._hits, self._kernels.evictions
        if requests:
            yield MetricPoint(name="kasmina.cache.hit_rate", value=hits / requests)
        yield MetricPoint(name="kasmina.cache.evictions", value=float(evictions))
        yield self.breaker.metric()
        yield from self._latencies.metrics()

    def _begin(self, blueprint_id: str) -> bool:
        if blueprint_id in self._pending:
            return False
        if len(self._pending) >= self.config.entries:
            self._failures.put(blueprint_id, UNAVAILABLE)
            return False
        self._pending.add(blueprint_id)
        return True

    async def _load(self, blueprint_id: str) -> None:
        reason = UNAVAILABLE
        try:
            async with self._gate:
                found = await self._fetch_guarded(blueprint_id)
            if isinstance(found, Kernel):
                self.add(found)
                reason = ""
            else:
                reason = found
        finally:
            with self._lock:
                self._pending.discard(blueprint_id)
                if reason:
                    self._failures.put(blueprint_id, reason)

    async def _fetch_guarded(self, blueprint_id: str) -> Kernel | str:
        """Fetch through the breaker. A library that says it knows no such blueprint works."""
        if not self.breaker.allow():
            return UNAVAILABLE
        begun = self._clock()
        found = await self._try(blueprint_id)
        self._latencies.add(self._clock() - begun)
        if isinstance(found, Kernel) or found == UNKNOWN_BLUEPRINT:
            self.breaker.record_success()
        else:
            self.breaker.record_failure()
        return found

    async def _try(self, blueprint_id: str) -> Kernel | str:
        try:
            kernel = await self._fetch(blueprint_id)
        except NotFound:
            return UNKNOWN_BLUEPRINT
        except DataLoss:
            return KERNEL_DAMAGED
        except Exception as error:  # noqa: BLE001  # Whatever it is, the kernel is not there and the training goes on.
            log.warning("kernel_fetch_failed", blueprint_id=blueprint_id, error=str(error))
            return UNAVAILABLE
        is_big = len(kernel.weights or b"") > DIGESTED_AT_ONCE
        is_whole = await asyncio.to_thread(kernel.is_whole) if is_big else kernel.is_whole()
        return kernel if is_whole else KERNEL_DAMAGED
