from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from esper_rpc.errors import EsperError, InvalidRequest, NotFound
from esper_rpc.proto.leyline.v1 import KernelArtifactError, KernelArtifactReady, KernelCatalogUpdate
from esper_rpc.proto.urza.v1 import (
    BatchGetExtrasRequest,
    BatchGetExtrasResponse,
    Blueprint,
    BlueprintExtras,
    FetchKernelRequest,
    FetchKernelResponse,
    GetBlueprintRequest,
    GetBlueprintResponse,
    GetExtrasRequest,
    GetExtrasResponse,
    KernelHeader,
    ListBlueprintsRequest,
    ListBlueprintsResponse,
    PrefetchRequest,
    PrefetchResponse,
    SaveBlueprintRequest,
    SaveBlueprintResponse,
    UploadKernelRequest,
    UploadKernelResponse,
    WatchCatalogRequest,
    WatchCatalogResponse,
)
from esper_rpc.server import Call

from .library import BlueprintLibrary, Entry, artifact_ref

CHUNK_BYTES = 256 * 1024
DEFAULT_PAGE = 100
WATCHER_BACKLOG = 1024


class UrzaServicer:
    """Serves a BlueprintLibrary."""

    def __init__(self, library: BlueprintLibrary) -> None:
        self._library = library
        self._watchers: set[asyncio.Queue[Blueprint | None]] = set()

    async def is_able_to_serve(self) -> bool:
        """Whether the library can be read."""
        await asyncio.to_thread(self._library.list_from, "", 1)
        return True

    async def GetBlueprint(self, request: GetBlueprintRequest, call: Call) -> GetBlueprintResponse:
        """Return one blueprint."""
        return GetBlueprintResponse(blueprint=(await self._get(request.blueprint_id)).blueprint)

    async def GetExtras(self, request: GetExtrasRequest, call: Call) -> GetExtrasResponse:
        """Return the extras of one blueprint."""
        return GetExtrasResponse(extras=_extras(await self._get(request.blueprint_id)))

    async def BatchGetExtras(self, request: BatchGetExtrasRequest, call: Call) -> BatchGetExtrasResponse:
        """Return the extras of those blueprints that exist."""
        response = BatchGetExtrasResponse()
        for blueprint_id in request.blueprint_ids:
            try:
                response.extras.append(_extras(await self._get(blueprint_id)))
            except NotFound:
                response.unknown_blueprint_ids.append(blueprint_id)
        return response

    async def ListBlueprints(self, request: ListBlueprintsRequest, call: Call) -> ListBlueprintsResponse:
        """Return a page; the token is the last identifier of the page before."""
        size, after = request.page_size or DEFAULT_PAGE, request.page_token
        found: list[Blueprint] = []
        while len(found) <= size:
            page = await asyncio.to_thread(self._library.list_from, after, size + 1)
            found += [b for b in page if _matches(b, request)]
            if len(page) <= size:
                break
            after = page[-1].descriptor.blueprint_id
        more = found[size - 1].descriptor.blueprint_id if len(found) > size else ""
        return ListBlueprintsResponse(blueprints=found[:size], next_page_token=more)

    async def SaveBlueprint(self, request: SaveBlueprintRequest, call: Call) -> SaveBlueprintResponse:
        """Save a blueprint and tell those who watch."""
        if not request.blueprint.descriptor.blueprint_id:
            raise InvalidRequest("blueprint.descriptor.blueprint_id is required.")
        saved, created = await asyncio.to_thread(self._library.save, request.blueprint, request.extras_json)
        if created:
            self._announce(saved)
        return SaveBlueprintResponse(blueprint=saved, created=created)

    async def UploadKernel(self, requests: AsyncIterator[UploadKernelRequest], call: Call) -> UploadKernelResponse:
        """Collect the chunks and store them when they are whole."""
        header, content = await _collect(requests)
        ref = await asyncio.to_thread(self._library.attach_kernel, header.blueprint_id, content, header.sha256)
        self._announce((await self._get(header.blueprint_id)).blueprint)
        return UploadKernelResponse(artifact_ref=ref)

    async def FetchKernel(self, request: FetchKernelRequest, call: Call) -> AsyncIterator[FetchKernelResponse]:
        """Send a header, then the kernel in chunks."""
        content = await asyncio.to_thread(self._library.read_kernel, request.blueprint_id)
        digest = hashlib.sha256(content).digest()
        header = KernelHeader(blueprint_id=request.blueprint_id, size_bytes=len(content), sha256=digest)
        yield FetchKernelResponse(header=header)
        for start in range(0, len(content), CHUNK_BYTES):
            yield FetchKernelResponse(chunk=content[start : start + CHUNK_BYTES])

    async def Prefetch(self, request: PrefetchRequest, call: Call) -> PrefetchResponse:
        """Say where a kernel lies, or why it cannot be had."""
        asked = request.prefetch
        try:
            manifest = (await self._get(asked.blueprint_id)).blueprint.manifest
            if manifest.weights_sha256:
                await asyncio.to_thread(self._library.read_kernel, asked.blueprint_id)
        except EsperError as error:
            return PrefetchResponse(
                error=KernelArtifactError(
                    request_id=asked.request_id, blueprint_id=asked.blueprint_id, reason=error.reason
                )
            )
        digest = manifest.weights_sha256
        ready = KernelArtifactReady(request_id=asked.request_id, blueprint_id=asked.blueprint_id)
        if digest:
            ready.artifact_ref, ready.checksum = artifact_ref(digest), digest.hex()
        return PrefetchResponse(ready=ready)

    async def WatchCatalog(self, request: WatchCatalogRequest, call: Call) -> AsyncIterator[WatchCatalogResponse]:
        """Send every blueprint, then every change."""
        queue: asyncio.Queue[Blueprint | None] = asyncio.Queue(WATCHER_BACKLOG)
        self._watchers.add(queue)
        try:
            after = ""
            while page := await asyncio.to_thread(self._library.list_from, after, DEFAULT_PAGE):
                for blueprint in page:
                    yield _update(blueprint)
                after = page[-1].descriptor.blueprint_id
            while (changed := await queue.get()) is not None:
                yield _update(changed)
        finally:
            self._watchers.discard(queue)

    def begin_drain(self) -> None:
        """End the watches, which would otherwise hold up the drain."""
        self._send(None)

    def _announce(self, blueprint: Blueprint) -> None:
        self._send(blueprint)

    def _send(self, item: Blueprint | None) -> None:
        for queue in self._watchers:
            if not queue.full():
                queue.put_nowait(item)

    async def _get(self, blueprint_id: str) -> Entry:
        cached = self._library.cached(blueprint_id)
        return cached if cached is not None else await asyncio.to_thread(self._library.get, blueprint_id)


def _extras(entry: Entry) -> BlueprintExtras:
    b = entry.blueprint
    return BlueprintExtras(
        blueprint_id=b.descriptor.blueprint_id, extras_json=entry.extras_json, extras_digest=b.extras_digest
    )


def _matches(blueprint: Blueprint, request: ListBlueprintsRequest) -> bool:
    return (not request.tier or blueprint.descriptor.tier == request.tier) and set(request.tags) <= set(blueprint.tags)


def _update(blueprint: Blueprint) -> WatchCatalogResponse:
    digest = blueprint.manifest.weights_sha256
    update = KernelCatalogUpdate(blueprint_id=blueprint.descriptor.blueprint_id)
    if digest:
        update.artifact_ref, update.checksum = artifact_ref(digest), digest.hex()
    return WatchCatalogResponse(update=update)


async def _collect(requests: AsyncIterator[UploadKernelRequest]) -> tuple[KernelHeader, bytes]:
    header: KernelHeader | None = None
    content = bytearray()
    async for request in requests:
        if request.WhichOneof("part") == "header":
            if header is not None:
                raise InvalidRequest("The header comes once, before the chunks.")
            header = request.header
        elif header is None:
            raise InvalidRequest("The header comes before the chunks.")
        else:
            content += request.chunk
            if len(content) > header.size_bytes:
                raise InvalidRequest("The chunks are larger than the header's size_bytes.")
    if header is None or len(content) != header.size_bytes:
        raise InvalidRequest("The upload ended before size_bytes were sent; nothing was kept.")
    return header, bytes(content)
