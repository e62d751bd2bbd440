from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import orjson

from esper_rpc.breaker import CircuitBreaker
from esper_rpc.errors import EsperError
from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import RunSite
from esper_rpc.proto.urza.v1 import (
    BatchGetExtrasRequest,
    BatchGetExtrasResponse,
    Blueprint,
    ListBlueprintsRequest,
    ListBlueprintsResponse,
)
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import observe_urza_timeout, tell_missing_sheets
from esper_servers.blueprints.binding import fits
from esper_servers.policy.graph import BlueprintCandidate

from .risk.bsds import read_sheet
from .risk.events import SOURCE

REFRESH_SECONDS = 2.0
CATALOGUE_SECONDS = 0.2
EXTRAS_SECONDS = 0.02
MAX_BLUEPRINTS = 64
TIMEOUT_URZA = "timeout_urza"
BSDS_PRESENT = "bsds_present"
CATALOGUE, EXTRAS = "catalogue", "extras"


class BlueprintReader(Protocol):
    """What is needed of Urza's client."""

    async def list_blueprints(self, request: ListBlueprintsRequest, *, timeout: float = ...) -> ListBlueprintsResponse:
        """List blueprints."""
        ...

    async def batch_get_extras(self, request: BatchGetExtrasRequest, *, timeout: float = ...) -> BatchGetExtrasResponse:
        """Get their extras."""
        ...


class BlueprintCache:
    """The catalogue, refreshed in the background. A step reads what is here and never waits."""

    def __init__(self, breaker: CircuitBreaker | None = None) -> None:
        self._breaker = breaker or CircuitBreaker()
        self.version = 0
        self._entries: list[tuple[Blueprint, BlueprintCandidate]] = []
        self._missed: set[str] = set()
        """What did not come since the last time that everything did."""

    def __len__(self) -> int:
        return len(self._entries)

    def candidates(self, sites: Sequence[RunSite]) -> list[BlueprintCandidate]:
        """Return the blueprints that fit at least one of the sites."""
        found = []
        for blueprint, candidate in self._entries:
            suited = frozenset(site.site_id for site in sites if _binds(blueprint, site))
            if suited:
                found.append(replace(candidate, fits=suited))
        return found

    def replace_with(self, blueprints: Sequence[Blueprint], extras: BatchGetExtrasResponse) -> None:
        """Take over a catalogue; the version changes only when the content does."""
        documents = {e.blueprint_id: e for e in extras.extras}
        entries = []
        for blueprint in blueprints[:MAX_BLUEPRINTS]:
            extra = documents.get(blueprint.descriptor.blueprint_id)
            entries.append((blueprint, _candidate(blueprint, extra.extras_json if extra else b"{}")))
        if not self._holds([b for b, _ in entries]):
            self._entries = entries
            self.version += 1
            self._tell_sheets()

    async def refresh(self, reader: BlueprintReader) -> bool:
        """Read the catalogue once; False when Urza did not answer or failed too often, and the old content stays."""
        if not self._breaker.allow():
            return False
        try:
            request = ListBlueprintsRequest(page_size=MAX_BLUEPRINTS)
            page = await reader.list_blueprints(request, timeout=CATALOGUE_SECONDS)
        except EsperError as error:
            self._breaker.record_failure()
            return self._miss(CATALOGUE, CATALOGUE_SECONDS, error)
        self._breaker.record_success()
        try:
            extras = await self._new_extras(page.blueprints, reader)
        except EsperError as error:
            # Their budget is short, and a busy library misses it without being ill. Blueprints without their sheets
            # could not be told to be dangerous, so the old ones stay.
            return self._miss(EXTRAS, EXTRAS_SECONDS, error)
        self._missed.clear()
        self.replace_with(page.blueprints, extras)
        return True

    async def keep_fresh(self, reader: BlueprintReader) -> None:
        """Refresh until cancelled."""
        while True:
            await self.refresh(reader)
            await asyncio.sleep(REFRESH_SECONDS)

    async def _new_extras(self, blueprints: Sequence[Blueprint], reader: BlueprintReader) -> BatchGetExtrasResponse:
        """Ask for the extras of a catalogue, unless it is the one here."""
        if not blueprints or self._holds(blueprints):
            return BatchGetExtrasResponse()
        wanted = BatchGetExtrasRequest(blueprint_ids=[b.descriptor.blueprint_id for b in blueprints])
        return await reader.batch_get_extras(wanted, timeout=EXTRAS_SECONDS)

    def _holds(self, blueprints: Sequence[Blueprint]) -> bool:
        """Whether these are the ones here; each has the digest of its extras, so those are the same too."""
        return list(blueprints) == [blueprint for blueprint, _ in self._entries]

    def _tell_sheets(self) -> None:
        sheets = sum(_has_sheet(candidate) for _, candidate in self._entries)
        missing = len(self._entries) - sheets
        tell_missing_sheets(missing)
        if sheets:
            level = TelemetryLevel.TELEMETRY_LEVEL_INFO
            tell_event(SOURCE, BSDS_PRESENT, level, reason="catalogue_changed", sheets=sheets, missing=missing)

    def _miss(self, wanted: str, budget_seconds: float, error: EsperError) -> bool:
        """Tell what did not come, once until everything does: each event has the last steps written down."""
        observe_urza_timeout(wanted)
        if wanted not in self._missed:
            self._missed.add(wanted)
            _tell_timeout(wanted, budget_seconds, error)
        return False


def _tell_timeout(wanted: str, budget_seconds: float, error: EsperError) -> None:
    tell_event(
        SOURCE, TIMEOUT_URZA, TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason=error.reason, wanted=wanted,
        metadata_timeout_budget_ms=budget_seconds * 1000, error=error.message[:200],
    )  # fmt: skip


def _has_sheet(candidate: BlueprintCandidate) -> bool:
    return bool(candidate.hazard_band or candidate.handling_class) or candidate.bsds_risk is not None


def _binds(blueprint: Blueprint, site: RunSite) -> bool:
    manifest = blueprint.manifest
    if not site.output_shape or (manifest.dtypes and site.dtype not in manifest.dtypes):
        return False
    return fits(list(manifest.input_shape), list(site.output_shape))


def _candidate(blueprint: Blueprint, extras_json: bytes) -> BlueprintCandidate:
    try:
        extras = orjson.loads(extras_json)
    except orjson.JSONDecodeError:
        extras = {}
    extras = extras if isinstance(extras, dict) else {}
    sheet = read_sheet(extras)
    return BlueprintCandidate(
        blueprint_id=blueprint.descriptor.blueprint_id,
        descriptor=blueprint.descriptor,
        extras=extras,
        extras_digest=blueprint.extras_digest,
        hazard_band=sheet.hazard_band,
        handling_class=sheet.handling_class,
        bsds_risk=sheet.risk_score,
    )
