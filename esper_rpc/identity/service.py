from __future__ import annotations

import asyncio

from google.protobuf.timestamp_pb2 import Timestamp

from esper_rpc.proto.identity.v1 import RenewCertificateRequest, RenewCertificateResponse
from esper_rpc.server import Call

from .authority import Authority


class IdentityServicer:
    """Renews the certificate of whoever calls, under the caller's own name."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def RenewCertificate(self, request: RenewCertificateRequest, call: Call) -> RenewCertificateResponse:
        """Issue a leaf for the caller's SPIFFE id and the key of the signing request."""
        leaf = await asyncio.to_thread(self._authority.issue, call.peer, csr_pem=request.csr_pem.encode())
        not_after = Timestamp()
        not_after.FromDatetime(leaf.not_after)
        return RenewCertificateResponse(chain_pem=leaf.chain_pem.decode(), not_after=not_after)
