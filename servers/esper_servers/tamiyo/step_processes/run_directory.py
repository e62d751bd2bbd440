from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

from esper_rpc.errors import EsperError, NotFound, PermissionDenied
from esper_rpc.proto.tamiyo.v1 import OpenRunRequest

from .carried_run import CarriedRun


class Holder(Protocol):
    """A process that holds runs."""

    async def hand_over(self, run_id: str) -> CarriedRun | None:
        """Let go of a run when its step has ended; None when it is not here."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    owner: str
    holder: Holder


class RunDirectory:
    """Who owns each run, and which process holds it: exactly one does, and hands it over to whichever is asked next.

    Lives in the process that administers the others.
    """

    def __init__(self, register: Callable[[OpenRunRequest], None] = lambda _request: None) -> None:
        self._register = register
        self._places: dict[str, _Place] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def seen_by(self, holder: Holder) -> LocalPlaces:
        """Return this directory as a holder in this process sees it."""
        return LocalPlaces(self, holder)

    async def claim(self, request: OpenRunRequest, owner: str, holder: Holder) -> CarriedRun | None:
        """Have a run opened at `holder`; returns what another process remembered of it, until now.

        Raises PermissionDenied when another identity opened it.
        """
        async with self._lock(request.run_id):
            place = self._places.get(request.run_id)
            carried = await self._moved(request.run_id, place, owner, holder) if place is not None else None
            self._places[request.run_id] = _Place(owner, holder)
        self._register(request)
        return carried

    async def fetch(self, run_id: str, owner: str, holder: Holder) -> CarriedRun | None:
        """Move an open run to `holder`; None when it is there. Raises NotFound and PermissionDenied."""
        async with self._lock(run_id):
            place = self._places.get(run_id)
            if place is None:
                raise _not_open(run_id)
            carried = await self._moved(run_id, place, owner, holder)
            if carried is None and place.holder is not holder:
                del self._places[run_id]
                raise _not_open(run_id)  # It went down with the process that held it.
            self._places[run_id] = _Place(owner, holder)
            return carried

    def release(self, run_id: str, holder: Holder) -> None:
        """Note that a holder forgot a run."""
        place = self._places.get(run_id)
        if place is not None and place.holder is holder:
            del self._places[run_id]

    def release_all(self, holder: Holder) -> None:
        """Note that a holder is gone."""
        self._places = {run_id: place for run_id, place in self._places.items() if place.holder is not holder}

    def check(self, run_id: str, owner: str | None) -> None:
        """Raise NotFound unless the run is open, PermissionDenied unless this identity opened it; None is any."""
        place = self._places.get(run_id)
        if place is None:
            raise _not_open(run_id)
        if owner is not None:
            _check_owner(place, owner)

    async def _moved(self, run_id: str, place: _Place, owner: str, holder: Holder) -> CarriedRun | None:
        _check_owner(place, owner)
        if place.holder is holder:
            return None
        try:
            return await place.holder.hand_over(run_id)
        except EsperError:  # It has just ended, and what it remembered with it.
            return None

    def _lock(self, run_id: str) -> asyncio.Lock:
        lock = self._locks.get(run_id)
        if lock is None:
            lock = self._locks[run_id] = asyncio.Lock()
        return lock


class LocalPlaces:
    """The directory as one holder in its process sees it."""

    def __init__(self, directory: RunDirectory, holder: Holder) -> None:
        self._directory = directory
        self._holder = holder

    async def claim(self, request: OpenRunRequest, owner: str) -> CarriedRun | None:
        """Have a run opened by the holder."""
        return await self._directory.claim(request, owner, self._holder)

    async def fetch(self, run_id: str, owner: str) -> CarriedRun | None:
        """Move an open run to the holder."""
        return await self._directory.fetch(run_id, owner, self._holder)

    def release(self, run_id: str) -> None:
        """Note that the holder forgot a run."""
        self._directory.release(run_id, self._holder)


def _check_owner(place: _Place, owner: str) -> None:
    if place.owner != owner:
        raise PermissionDenied("This run was opened by another identity.", reason="NOT_THE_OWNER")


def _not_open(run_id: str) -> NotFound:
    return NotFound(f"Run {run_id!r} is not open here; call OpenRun first.", reason="RUN_NOT_OPEN")
