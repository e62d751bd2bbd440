from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509

from esper_rpc.errors import PermissionDenied, Unauthenticated

from .authorisation import STRANGER_ROLE
from .authority import utc_now
from .deny_list import DenyList
from .spiffe import SpiffeId

STRANGER = SpiffeId(STRANGER_ROLE, "unproven")
"""Who calls without a certificate, where that is permitted at all."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls, and until when the certificate says so."""

    spiffe_id: SpiffeId
    not_after: datetime | None = None


CURRENT_PEER: ContextVar[Peer] = ContextVar("esper_peer")
"""The peer of the call that this task serves; set before anything else looks at the call."""


class PeerTrust:
    """Whether a peer that proved its name is still to be served: its leaf may have ended, or its name be denied."""

    def __init__(self, deny_list: DenyList | None = None, clock: Callable[[], datetime] = utc_now) -> None:
        self._deny_list = deny_list or DenyList()
        self._clock = clock

    def check(self, peer: Peer) -> None:
        """Raise Unauthenticated or PermissionDenied. A connection outlives its handshake, so ask at every call."""
        if peer.not_after is not None and peer.not_after <= self._clock():
            raise Unauthenticated(
                f"The certificate of {peer.spiffe_id} ended at {peer.not_after:%F %T} UTC; renew it and reconnect.",
                reason="CERTIFICATE_ENDED",
            )
        denied = self._deny_list.reason_for(peer.spiffe_id)
        if denied is not None:
            raise PermissionDenied(f"{peer.spiffe_id} is on the deny list: {denied}.", reason="DENIED_IDENTITY")

    def refresh(self) -> None:
        """Read the deny list again if it has changed."""
        self._deny_list.refresh()


@lru_cache(maxsize=4096)
def leaf_end(leaf_pem: bytes) -> datetime:
    """When a certificate ends; raises Unauthenticated for what cannot be read."""
    try:
        return x509.load_pem_x509_certificate(leaf_pem).not_valid_after_utc
    except ValueError as error:
        raise Unauthenticated("The peer's certificate cannot be read.") from error
