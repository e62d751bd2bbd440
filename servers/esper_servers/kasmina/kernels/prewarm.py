from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
from torch import nn

from esper_rpc.proto.leyline.v1 import AdaptationCommand, MetricPoint
from esper_servers.blueprints.catalogue import BlueprintFactory
from esper_servers.blueprints.kernel import KernelRejected, instantiate
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from esper_servers.blueprints.seeded_draws import SeededDraws
from esper_servers.kasmina.site import Site
from esper_servers.kasmina.trial import trial

from .background import Work
from .latencies import Latencies
from .library import Kernel
from .timed_lru import TimedLru

log = structlog.get_logger(__name__)

BUILD_FAILED = "build_failed"
MOST_PREPARED = 64
"""Modules that wait for the safe point of their command."""
PREPARED_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A module that was built and tried for one command, or the reason why there is none."""

    kernel: Kernel | None = None
    module: nn.Module | None = None
    reason: str = ""


class Prewarmer:
    """Builds and tries modules, each for one command: beside the training where it has a worker, else at once.

    Only the building runs on the worker. The rest is for the safe point.
    """

    def __init__(
        self,
        *,
        factories: Mapping[str, BlueprintFactory],
        background: Callable[[Work], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._factories = factories
        self._background = background
        self._clock = clock
        self._latencies = Latencies("kasmina.prewarm.latency_ms")
        self._building: TimedLru[Future[Prepared]] = TimedLru(
            entries=MOST_PREPARED, ttl_seconds=PREPARED_SECONDS, clock=clock
        )
        self._lock = threading.Lock()

    def module_for(self, command: AdaptationCommand, site: Site, kernel: Kernel) -> Prepared | None:
        """Return the module of a command, None while it is being built."""
        if self._background is None:
            return self._prepare(command, site, kernel)
        with self._lock:
            building = self._building.get(command.command_id)
        if building is None or (building.done() and not _fits(building.result(), site)):
            self._begin(command, site, kernel, self._background)
            return None
        return building.result() if building.done() else None

    def forget(self, command_id: str) -> None:
        """Let go of what was built for a command."""
        with self._lock:
            self._building.remove(command_id)

    def clear(self) -> int:
        """Let go of everything; returns how many modules that were."""
        with self._lock:
            return self._building.clear()

    def metrics(self) -> Iterator[MetricPoint]:
        """Yield how long building takes."""
        yield from self._latencies.metrics()

    def _begin(
        self, command: AdaptationCommand, site: Site, kernel: Kernel, background: Callable[[Work], None]
    ) -> None:
        building: Future[Prepared] = Future()
        with self._lock:
            self._building.put(command.command_id, building)
        background(lambda: building.set_result(self._prepare(command, site, kernel)))

    def _prepare(self, command: AdaptationCommand, site: Site, kernel: Kernel) -> Prepared:
        begun = self._clock()
        seed = uuid.UUID(command.command_id).int
        try:
            module = self._build(site, kernel, seed)
            with SeededDraws(seed):
                reason = trial(module, site)
        except KernelRejected as rejected:
            return Prepared(reason=rejected.reason)
        except Exception as error:  # noqa: BLE001  # A blueprint is foreign code; whatever it raises, the training goes on.
            log.warning("blueprint_failed", seed_id=command.target_seed_id, error=str(error))
            return Prepared(reason=OUT_OF_MEMORY if is_out_of_memory(error) else BUILD_FAILED)
        finally:
            self._latencies.add(self._clock() - begun)
        return Prepared(reason=reason) if reason else Prepared(kernel, module)

    def _build(self, site: Site, kernel: Kernel, seed: int) -> nn.Module:
        return instantiate(
            kernel.blueprint.manifest,
            self._factories,
            feature_shape=site.output_shape,
            dtype=site.dtype,
            device=site.device,
            weights=kernel.weights,
            seed=seed,
        )


def _fits(prepared: Prepared, site: Site) -> bool:
    """Whether the model has not been moved or cast since the module was built."""
    parameters = prepared.module.parameters() if prepared.module is not None else iter(())
    return all(p.device == site.device and p.dtype == site.dtype for p in parameters if p.is_floating_point())
