from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

from esper_client.hedging import Hedge, HedgeConfig
from esper_rpc.breaker import BreakerConfig
from esper_rpc.identity import Identity
from esper_rpc.proto.urza.v1 import (
    BatchGetExtrasRequest,
    BatchGetExtrasResponse,
    FetchKernelRequest,
    FetchKernelResponse,
    GetBlueprintRequest,
    GetBlueprintResponse,
    GetExtrasRequest,
    GetExtrasResponse,
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

from .mesh_client import CLIENT_BREAKER, MeshClient


class UrzaClient(MeshClient):
    """UrzaService is the library of blueprints and their kernels."""

    role = "urza"
    service = "esper.urza.v1.UrzaService"
    retried = ("GetBlueprint", "GetExtras", "BatchGetExtras", "ListBlueprints")

    def __init__(
        self,
        address: str,
        *,
        identity: Identity,
        breaker: BreakerConfig = CLIENT_BREAKER,
        hedge: HedgeConfig | None = None,
    ) -> None:
        super().__init__(address, identity=identity, breaker=breaker)
        self.hedge = Hedge(hedge)

    async def get_blueprint(self, request: GetBlueprintRequest, *, timeout: float = 2.0) -> GetBlueprintResponse:
        """Returns one blueprint."""
        return await self.hedge.first(lambda: self._unary("GetBlueprint", request, GetBlueprintResponse, timeout))

    async def get_extras(self, request: GetExtrasRequest, *, timeout: float = 2.0) -> GetExtrasResponse:
        """Returns the extras of one blueprint."""
        return await self.hedge.first(lambda: self._unary("GetExtras", request, GetExtrasResponse, timeout))

    async def batch_get_extras(self, request: BatchGetExtrasRequest, *, timeout: float = 2.0) -> BatchGetExtrasResponse:
        """Returns the extras of several blueprints; unknown ones are named, not refused."""
        return await self.hedge.first(lambda: self._unary("BatchGetExtras", request, BatchGetExtrasResponse, timeout))

    async def list_blueprints(self, request: ListBlueprintsRequest, *, timeout: float = 2.0) -> ListBlueprintsResponse:
        """Lists blueprints by identifier."""
        return await self.hedge.first(lambda: self._unary("ListBlueprints", request, ListBlueprintsResponse, timeout))

    async def save_blueprint(self, request: SaveBlueprintRequest, *, timeout: float = 2.0) -> SaveBlueprintResponse:
        """Saves a blueprint with its extras."""
        return await self._unary("SaveBlueprint", request, SaveBlueprintResponse, timeout)

    async def upload_kernel(
        self, requests: AsyncIterable[UploadKernelRequest], *, timeout: float = 60.0
    ) -> UploadKernelResponse:
        """Uploads the kernel of a saved blueprint."""
        return await self._upload("UploadKernel", requests, UploadKernelRequest, UploadKernelResponse, timeout)

    def fetch_kernel(
        self, request: FetchKernelRequest, *, timeout: float | None = None
    ) -> AsyncIterator[FetchKernelResponse]:
        """Downloads a kernel: one header, then chunks in order."""
        return self._download("FetchKernel", request, FetchKernelResponse, timeout)

    async def prefetch(self, request: PrefetchRequest, *, timeout: float = 2.0) -> PrefetchResponse:
        """Makes a kernel ready to be fetched fast and tells its reference, or why it cannot."""
        return await self._unary("Prefetch", request, PrefetchResponse, timeout)

    def watch_catalog(
        self, request: WatchCatalogRequest, *, timeout: float | None = None
    ) -> AsyncIterator[WatchCatalogResponse]:
        """Streams changes of the catalogue."""
        return self._download("WatchCatalog", request, WatchCatalogResponse, timeout)
