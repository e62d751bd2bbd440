"""Who made an envelope and for whom: what holds for every payload, before its own rules against replay."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from esper_rpc.proto.leyline.v1 import SignedEnvelope

from . import reasons
from .encoding import mac_input
from .keys import Keyring
from .signing import VERSION

FUTURE_NS = 5 * 10**9


class Rejected(Exception):  # It names a verdict, not a fault.
    """The envelope is refused for a stable reason, and nothing has changed."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def check_authentic(
    envelope: SignedEnvelope,
    *,
    keyring: Keyring,
    audience: str,
    issuers: Mapping[str, frozenset[str]],
    max_payload_bytes: int,
) -> None:
    """Raise Rejected unless one of the issuers of its payload type signed it for this audience.

    In this order: size, key, MAC in constant time, payload type by issuer, audience. Nothing is parsed before.
    """
    if len(envelope.payload) > max_payload_bytes:
        raise Rejected(reasons.OVERSIZE, f"{len(envelope.payload)} bytes")
    if not envelope.mac:
        raise Rejected(reasons.MISSING_SIGNATURE)
    key = keyring.verification_key(envelope.key_id, envelope.issuer, envelope.audience)
    if key is None:
        raise Rejected(_why_no_key(envelope, keyring))
    expected = hmac.digest(key, mac_input(envelope), "sha256")
    if envelope.version != VERSION or not hmac.compare_digest(expected, envelope.mac):
        raise Rejected(reasons.INVALID_SIGNATURE)
    _check_address(envelope, audience, issuers)


def check_age(envelope: SignedEnvelope, now_ns: int, past_ns: int) -> None:
    """Raise Rejected for an envelope that is older than `past_ns`, or comes from the future."""
    age = now_ns - envelope.issued_at_ns
    if age > past_ns:
        raise Rejected(reasons.STALE_COMMAND)
    if age < -FUTURE_NS:
        raise Rejected(reasons.FUTURE_COMMAND)


def _check_address(envelope: SignedEnvelope, audience: str, issuers: Mapping[str, frozenset[str]]) -> None:
    if envelope.payload_type not in issuers:
        raise Rejected(reasons.WRONG_PAYLOAD_TYPE, envelope.payload_type)
    if envelope.issuer not in issuers[envelope.payload_type]:
        raise Rejected(reasons.WRONG_ISSUER, envelope.issuer)
    if envelope.audience != audience:
        raise Rejected(reasons.WRONG_AUDIENCE)


def _why_no_key(envelope: SignedEnvelope, keyring: Keyring) -> str:
    if not keyring.knows(envelope.key_id):
        return reasons.UNKNOWN_KEY
    return reasons.WRONG_AUDIENCE if envelope.issuer in keyring.issuers() else reasons.WRONG_ISSUER
