from __future__ import annotations

import hmac

from esper_rpc.proto.leyline.v1 import SignedEnvelope

from .encoding import mac_input
from .keys import Keyring

VERSION = 1


def sign(
    payload: bytes,
    *,
    payload_type: str,
    keyring: Keyring,
    audience: str,
    issued_at_ns: int,
    nonce: str,
    run_id: str = "",
    receiver_epoch: bytes = b"",
    sequence: int = 0,
    request_digest: bytes = b"",
) -> SignedEnvelope:
    """Wrap serialised bytes, which travel exactly as signed, for one audience. The issuer is the keyring's role."""
    envelope = SignedEnvelope(
        version=VERSION,
        payload_type=payload_type,
        payload=payload,
        key_id=keyring.active_key_id,
        issuer=keyring.role,
        audience=audience,
        run_id=run_id,
        receiver_epoch=receiver_epoch,
        sequence=sequence,
        issued_at_ns=issued_at_ns,
        nonce=nonce,
        request_digest=request_digest,
    )
    envelope.mac = hmac.digest(keyring.signing_key(audience), mac_input(envelope), "sha256")
    return envelope
