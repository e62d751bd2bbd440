from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from esper_rpc.errors import Unimplemented
from esper_rpc.proto.identity.v1 import (
    EnrollRequest,
    EnrollResponse,
    RenewCertificateRequest,
    RenewCertificateResponse,
)
from esper_rpc.server import Call

from .authority import LEAF_LIFETIME, Authority, IssuedLeaf, check_signing_request
from .enrolment import EnrolmentTokens
from .spiffe import SpiffeId


class IdentityServicer:
    """Renews the certificate of whoever calls under the caller's own name, and enrols who brings a token."""

    def __init__(
        self,
        authority: Callable[[], Authority],
        tokens: EnrolmentTokens | None = None,
        leaf_lifetime: timedelta = LEAF_LIFETIME,
    ) -> None:
        self._authority = authority
        self._tokens = tokens
        self._leaf_lifetime = leaf_lifetime

    async def RenewCertificate(self, request: RenewCertificateRequest, call: Call) -> RenewCertificateResponse:
        """Issue a leaf for the caller's SPIFFE id and the key of the signing request."""
        leaf = await self._issue(call.peer, request.csr_pem.encode())
        return RenewCertificateResponse(chain_pem=leaf.chain_pem.decode(), not_after=_timestamp(leaf.not_after))

    async def Enroll(self, request: EnrollRequest, call: Call) -> EnrollResponse:
        """Issue a first leaf, under the name that the token was made for."""
        if self._tokens is None:
            raise Unimplemented("This server redeems no tokens; `esper up` serves enrolment on a port of its own.")
        csr = request.csr_pem.encode()
        check_signing_request(csr)  # Before the token is used up.
        enrolment = await asyncio.to_thread(self._tokens.redeem, request.token)
        leaf = await self._issue(enrolment.spiffe_id, csr)
        return EnrollResponse(
            chain_pem=leaf.chain_pem.decode(),
            root_pem=leaf.root_pem.decode(),
            not_after=_timestamp(leaf.not_after),
            keyring_json=enrolment.keyring_json,
        )

    async def _issue(self, spiffe_id: SpiffeId, csr_pem: bytes) -> IssuedLeaf:
        return await asyncio.to_thread(
            self._authority().issue, spiffe_id, csr_pem=csr_pem, lifetime=self._leaf_lifetime
        )


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
