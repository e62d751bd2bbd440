from __future__ import annotations

import struct

from esper_rpc.proto.leyline.v1 import SignedEnvelope

PREFIX = b"EsperEnvelope1"
_pack = struct.Struct("<Q").pack
_EMPTY = _pack(0)
_EIGHT = _pack(8)


def mac_input(envelope: SignedEnvelope) -> bytes:
    """Return the bytes that the MAC covers: the prefix, then fields 1 to 12, each with its length (envelope.proto)."""
    e = envelope
    return b"".join(
        (
            PREFIX,
            _integer(e.version),
            _text(e.payload_type),
            _blob(e.payload),
            _text(e.key_id),
            _text(e.issuer),
            _text(e.audience),
            _text(e.run_id),
            _blob(e.receiver_epoch),
            _integer(e.sequence),
            _integer(e.issued_at_ns),
            _text(e.nonce),
            _blob(e.request_digest),
        )
    )


def _integer(value: int) -> bytes:
    return _EIGHT + _pack(value) if value else _EMPTY


def _text(value: str) -> bytes:
    return _blob(value.encode())


def _blob(value: bytes) -> bytes:
    return _pack(len(value)) + value
