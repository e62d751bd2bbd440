"""A policy that runs along on live traffic without any effect, so that one sees how often it would decide otherwise."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import structlog

from esper_rpc.errors import EsperError
from esper_rpc.proto.leyline.v1 import SeedState
from esper_rpc.proto.tamiyo.v1 import RunStructure
from esper_rpc.telemetry.metrics import observe_shadow
from esper_servers.policy import checkpoint, masks
from esper_servers.policy.checkpoint import CheckpointRejected
from esper_servers.policy.features import Floats
from esper_servers.policy.graph import RunGraph
from esper_servers.policy.masks import Choice, Masks
from esper_servers.policy.policy import Policy, PolicyOutput
from esper_servers.policy.prior import PriorConfig, RunSignals
from esper_servers.tamiyo.aside import Aside
from esper_servers.tamiyo.choosing import Decided
from esper_servers.tamiyo.records.structure import run_of, write_structure
from esper_servers.tamiyo.run_state import RunState

from .store import Entry

log = structlog.get_logger(__name__)

SECONDS = 20.0
MOST_GRAPHS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One step as the live policy saw it, and what that put out."""

    features: Mapping[str, Floats]
    seeds: Sequence[bytes]
    signals: RunSignals
    masks: Masks
    output: PolicyOutput


class Shadow:
    """Follows live steps with another policy, in the admin process, one at a time: it skips what it has no time for."""

    def __init__(self, aside: Aside, prior: PriorConfig) -> None:
        self._aside = aside
        self._prior = prior
        self._path: Path | None = None
        self._waiting: tuple[RunGraph, RunState, Sample] | None = None
        self._running: asyncio.Task[None] | None = None
        self._structures: WeakKeyDictionary[RunGraph, bytes] = WeakKeyDictionary()
        self.entry: Entry | None = None
        """The policy that runs along."""
        self.compared = 0
        self.disagreed = 0

    @property
    def is_free(self) -> bool:
        """Whether the next step is to be noted."""
        return self._path is not None and self._waiting is None and self._running is None

    def start(self, entry: Entry, path: Path) -> None:
        """Follow with this policy from now on."""
        self.entry, self._path = entry, path
        self.compared = self.disagreed = 0

    def stop(self) -> None:
        """Follow no more."""
        self.entry, self._path, self._waiting = None, None, None

    def note(self, run: RunState, decided: Decided, seeds: Sequence[SeedState]) -> None:
        """Keep a step to follow it when its answer has left; call it before the run goes on."""
        if decided.output is None or decided.masks is None:
            return
        sample = Sample(
            features=run.graph.copy_features(),
            seeds=[seed.SerializeToString() for seed in seeds],
            signals=run.signals(),
            masks=decided.masks,
            output=decided.output,
        )
        self._waiting = run.graph, run, sample

    def follow(self) -> None:
        """Follow what was noted, beside the steps; call it on the loop."""
        if self._waiting is not None and self._path is not None:
            graph, run, sample = self._waiting
            self._waiting = None
            self._running = asyncio.create_task(self._follow(self._path, graph, run, sample))

    async def _follow(self, path: Path, graph: RunGraph, run: RunState, sample: Sample) -> None:
        try:
            structure = self._structures.get(graph)
            if structure is None:
                structure = await asyncio.to_thread(write_structure, run.request, graph)
                self._structures[graph] = structure
            agrees = await self._aside.run(SECONDS, agrees_with_live, path, self._prior, structure, sample)
            self._count(path, agrees=agrees)
        except (EsperError, CheckpointRejected, OSError) as error:
            log.warning("shadow_failed", policy_version=self.entry and self.entry.version, error=str(error)[:200])
            self.stop()
        finally:
            self._running = None

    def _count(self, path: Path, *, agrees: bool) -> None:
        if path == self._path:
            self.compared += 1
            self.disagreed += not agrees
            observe_shadow(agrees=agrees)


def agrees_with_live(path: Path, prior: PriorConfig, structure: bytes, sample: Sample) -> bool:
    """Whether the policy of a file would take the same action as the live one, of what was legal then."""
    graph = _graph(structure)
    graph.restore_features(sample.features)
    seeds = [SeedState.FromString(seed) for seed in sample.seeds]
    output = _policy(path, prior).evaluate(graph.inputs, seeds, sample.signals)
    if not output.is_finite:
        raise CheckpointRejected(checkpoint.NOT_FINITE, "its outputs on live traffic")
    return _prefers(output, sample.masks) == _prefers(sample.output, sample.masks)


def _prefers(output: PolicyOutput, legal: Masks) -> Choice:
    choice = masks.choose(output.kind, output.operation, output.blueprint, output.schedule, legal)
    # The schedule tells how, not what.
    return Choice(choice.kind, choice.seed, choice.operation, choice.blueprint)


@functools.lru_cache(maxsize=1)
def _policy(path: Path, prior: PriorConfig) -> Policy:
    return checkpoint.load(path, prior)


@functools.lru_cache(maxsize=MOST_GRAPHS)
def _graph(structure: bytes) -> RunGraph:
    return run_of(RunStructure.FromString(structure), "").graph
