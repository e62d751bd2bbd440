from __future__ import annotations

from esper_rpc.proto.identity.v1 import (
    EnrollRequest,
    EnrollResponse,
    RenewCertificateRequest,
    RenewCertificateResponse,
)

from .mesh_client import MeshClient


class IdentityClient(MeshClient):
    """IdentityService issues certificates to members of the mesh."""

    role = "weatherlight"  # Whoever starts the mesh holds the intermediate.
    service = "esper.identity.v1.IdentityService"

    async def renew_certificate(
        self, request: RenewCertificateRequest, *, timeout: float = 2.0
    ) -> RenewCertificateResponse:
        """Issues a new leaf to the holder of a valid one, with the same names."""
        return await self._unary("RenewCertificate", request, RenewCertificateResponse, timeout)

    async def enroll(self, request: EnrollRequest, *, timeout: float = 2.0) -> EnrollResponse:
        """Issues a first leaf for a one-time token."""
        return await self._unary("Enroll", request, EnrollResponse, timeout)
