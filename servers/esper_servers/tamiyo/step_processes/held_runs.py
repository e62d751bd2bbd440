from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from esper_rpc.errors import NotFound
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest
from esper_servers.policy.graph import BlueprintCandidate, RunGraph
from esper_servers.tamiyo.blueprint_cache import BlueprintCache
from esper_servers.tamiyo.giving_way import giving_way
from esper_servers.tamiyo.pipeline import StepPipeline
from esper_servers.tamiyo.run_state import build_graph

from .carried_run import CarriedRun
from .run_directory import Holder

Structure = tuple[int, list[BlueprintCandidate], RunGraph]
"""The version of a catalogue, what of it fits a run, and the graph made of both."""


class Places(Protocol):
    """A RunDirectory, as one holder of runs sees it."""

    async def claim(self, request: OpenRunRequest, owner: str) -> CarriedRun | None:
        """Have a run opened here; returns what another process remembered of it. Raises PermissionDenied."""
        ...

    async def fetch(self, run_id: str, owner: str) -> CarriedRun | None:
        """Move an open run here; None when it is here. Raises NotFound and PermissionDenied."""
        ...

    def release(self, run_id: str) -> None:
        """Note that a run is forgotten here."""
        ...


class HeldRuns:
    """The runs of this process. A run that another one holds comes here when it is opened or asked about here."""

    def __init__(self, pipeline: StepPipeline, blueprints: BlueprintCache, seen_by: Callable[[Holder], Places]) -> None:
        """`seen_by` makes the directory of runs as this holder sees it."""
        self._pipeline = pipeline
        self._runs = pipeline.runs
        self._blueprints = blueprints
        self._places = places = seen_by(self)
        self._one_arrival_at_a_time = asyncio.Lock()
        self._runs.on_forgotten = places.release
        pipeline.fetch_run = self.fetch

    async def open(self, request: OpenRunRequest, owner: str, *, protocol_version: int) -> bool:
        """Open or reopen a run; returns whether it is new. Raises PermissionDenied and FailedPrecondition."""
        structure = await self._structure(request)
        async with self._one_arrival_at_a_time:
            carried = await self._places.claim(request, owner)
            return self._take_in(request, owner, protocol_version, structure, carried)

    async def fetch(self, run_id: str, owner: str) -> None:
        """Have an open run here; raises NotFound and PermissionDenied."""
        async with self._one_arrival_at_a_time:
            carried = None if self._runs.holds(run_id) else await self._places.fetch(run_id, owner)
            if carried is not None:
                structure = await self._structure(carried.request)
                self._take_in(carried.request, owner, carried.protocol_version, structure, carried)

    async def close(self, run_id: str, owner: str) -> bool:
        """Forget a run; returns whether it was open. Raises PermissionDenied."""
        try:
            await self.fetch(run_id, owner)
        except NotFound:
            return False
        closed = self._runs.close(run_id, owner)
        if closed:
            self._pipeline.report()  # What its last steps told comes before its end.
            self._pipeline.observations.note_closed(run_id)
        return closed

    async def hand_over(self, run_id: str) -> CarriedRun | None:
        """Let go of a run when its step has ended; None when it is not here."""
        run = self._runs.take(run_id)
        if run is None:
            return None
        await run.until_settled()
        self._pipeline.report()  # What it remembers is complete then.
        return CarriedRun.of(run)

    async def _structure(self, request: OpenRunRequest) -> Structure:
        version, candidates = self._blueprints.version, self._blueprints.candidates(request.sites)
        with giving_way():  # The steps of others go on.
            return version, candidates, await asyncio.to_thread(self._build, request, candidates)

    def _build(self, request: OpenRunRequest, candidates: list[BlueprintCandidate]) -> RunGraph:
        graph = build_graph(request, candidates)
        self._pipeline.policy.prepare(graph.inputs)
        return graph

    def _take_in(
        self,
        request: OpenRunRequest,
        owner: str,
        protocol_version: int,
        structure: Structure,
        carried: CarriedRun | None,
    ) -> bool:
        version, candidates, graph = structure
        self._pipeline.report()  # Before an open run gets another graph.
        created = self._runs.open(
            request, owner, candidates, version, protocol_version,
            policy_norms=self._pipeline.policy.norms, graph=graph,
        )  # fmt: skip
        if carried is None or carried.request.receiver_epoch != request.receiver_epoch:
            return created
        carried.give_to(self._runs.find(request.run_id))
        return False
