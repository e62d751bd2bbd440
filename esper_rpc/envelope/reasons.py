"""Stable reasons for which an envelope or its command is rejected. They are words on the wire: never change one."""

from __future__ import annotations

MISSING_SIGNATURE = "missing_signature"
INVALID_SIGNATURE = "invalid_signature"
UNKNOWN_KEY = "unknown_key"
WRONG_ISSUER = "wrong_issuer"
WRONG_AUDIENCE = "wrong_audience"
WRONG_PAYLOAD_TYPE = "wrong_payload_type"
STALE_COMMAND = "stale_command"
FUTURE_COMMAND = "future_command"
WRONG_EPOCH = "wrong_epoch"
SEQUENCE_REPLAYED = "sequence_replayed"
NONCE_REPLAYED = "nonce_replayed"
OVERSIZE = "oversize"
UNSUPPORTED = "unsupported"
LOCAL_LIMIT = "local_limit"

ALL = frozenset(
    {
        MISSING_SIGNATURE, INVALID_SIGNATURE, UNKNOWN_KEY, WRONG_ISSUER, WRONG_AUDIENCE, WRONG_PAYLOAD_TYPE,
        STALE_COMMAND, FUTURE_COMMAND, WRONG_EPOCH, SEQUENCE_REPLAYED, NONCE_REPLAYED, OVERSIZE, UNSUPPORTED,
        LOCAL_LIMIT,
    }
)  # fmt: skip
