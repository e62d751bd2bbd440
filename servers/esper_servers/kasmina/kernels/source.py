from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from esper_client.client import UrzaClient
from esper_rpc.errors import DataLoss, EsperError
from esper_rpc.identity import Identity
from esper_rpc.proto.urza.v1 import FetchKernelRequest, GetBlueprintRequest, ListBlueprintsRequest

from .library import Kernel, KernelLibrary

log = structlog.get_logger(__name__)

CALL_SECONDS = 2.0
DOWNLOAD_SECONDS = 60.0
PAGE = 1000
MOST_PAGES = 100
RETRY_SECONDS = 30.0


class KernelSource:
    """Gets kernels from Urza."""

    def __init__(self, address: str, identity: Identity) -> None:
        self._address = address
        self._identity = identity

    async def fetch(self, blueprint_id: str) -> Kernel:
        """Get one kernel; raises EsperError."""
        async with UrzaClient(self._address, identity=self._identity) as urza:
            request = GetBlueprintRequest(blueprint_id=blueprint_id)
            blueprint = (await urza.get_blueprint(request, timeout=CALL_SECONDS)).blueprint
            weights = await _download(urza, blueprint_id) if blueprint.manifest.weights_sha256 else None
            return Kernel(blueprint, weights)

    async def keep_catalogue(
        self, library: KernelLibrary, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Put the manifests of the whole catalogue into a library, and again before they expire. Never ends.

        So a germination waits for no fetch, but for a kernel with weights.
        """
        was_away = False
        while True:
            try:
                await self._take_catalogue(library)
                was_away, pause = False, library.config.ttl_seconds / 2
            except EsperError as error:
                if not was_away:
                    log.warning("catalogue_prefetch_failed", error=str(error))
                was_away, pause = True, min(RETRY_SECONDS, library.config.ttl_seconds / 2)
            await sleep(pause)

    async def _take_catalogue(self, library: KernelLibrary) -> None:
        request = ListBlueprintsRequest(page_size=PAGE)
        async with UrzaClient(self._address, identity=self._identity) as urza:
            for _ in range(MOST_PAGES):
                page = await urza.list_blueprints(request, timeout=CALL_SECONDS)
                for blueprint in page.blueprints:
                    if not blueprint.manifest.weights_sha256:
                        library.add(Kernel(blueprint))
                request.page_token = page.next_page_token
                if not request.page_token:
                    return


async def _download(urza: UrzaClient, blueprint_id: str) -> bytes:
    content, size = bytearray(), 0
    request = FetchKernelRequest(blueprint_id=blueprint_id)
    async for part in urza.fetch_kernel(request, timeout=DOWNLOAD_SECONDS):
        size = part.header.size_bytes or size
        content += part.chunk
    if len(content) != size:
        raise DataLoss("The kernel ended before its size.")
    return bytes(content)
