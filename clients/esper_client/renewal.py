from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from esper_rpc.errors import EsperError
from esper_rpc.identity import Identity, LiveIdentity
from esper_rpc.identity.authority import utc_now
from esper_rpc.identity.signing_request import new_signing_request
from esper_rpc.proto.identity.v1 import RenewCertificateRequest

from .client import IdentityClient

log = structlog.get_logger(__name__)

CHECK_SECONDS = 1.0
RETRY_SHARE = 0.05
"""Of the time that is left, how long to wait after a failure."""


class CertificateRenewer:
    """Renews a leaf at two thirds of its life, and notices one that somebody else renewed on the disk."""

    def __init__(
        self,
        identity: Identity,
        *,
        address: str | None,
        on_renewed: Callable[[Identity], object] = lambda _identity: None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._live = LiveIdentity(identity)
        self._seen = identity
        self._address = address
        self._on_renewed = on_renewed
        self._clock = clock
        self._not_before = identity.renewal_due

    async def check(self) -> None:
        """Do what is due; call it every `CHECK_SECONDS`. A failure is logged and tried again later."""
        if self._address and self._clock() >= self._not_before:
            await self._renew(self._address)
        current = self._live.current()
        if current is not self._seen:
            self._seen, self._not_before = current, current.renewal_due
            log.info("certificate_taken_up", spiffe_id=str(current.spiffe_id), not_after=current.not_after.isoformat())
            self._on_renewed(current)

    async def _renew(self, address: str) -> None:
        key_pem, csr_pem = new_signing_request()
        try:
            async with IdentityClient(address, identity=self._seen) as client:
                response = await client.renew_certificate(RenewCertificateRequest(csr_pem=csr_pem.decode()))
            renewed = self._seen.with_leaf(response.chain_pem.encode(), key_pem)
            if renewed.directory is not None:
                renewed.save(renewed.directory)
        except (EsperError, OSError) as error:
            left = self._seen.not_after - self._clock()
            self._not_before = self._clock() + max(timedelta(seconds=CHECK_SECONDS), left * RETRY_SHARE)
            log.error("certificate_not_renewed", error=str(error)[:200], hours_left=left.total_seconds() / 3600)
